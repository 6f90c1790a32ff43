// The page: what is asked for on the left, the conversation on the right. Sound is in audio.js, the wire in call.js.

import { FRAME_MS, SoundError, openAudio } from "./audio.js";
import { Call, chatUrl } from "./call.js";
import { OPUS_RATE, OpusCodec, PCM_RATE, PcmCodec, opusWorks } from "./codec.js";
import { Wave } from "./waves.js";

// For a model that says of none that it plays it well.
const PRESETS = [
  ["Good conversation", "You enjoy having a good conversation."],
  ["Teacher", "You are a wise and friendly teacher. Answer questions or provide advice in a clear and engaging way."],
  ["Café", "You work for Sunrise Cafe, which is a coffee shop, and your name is Ben. Information: A black coffee costs four fifty. A latte costs five dollars. A hot chocolate costs seven dollars. Today's cake is cheese cake. You also have soy milk. You open at seven in the morning. You close at six. You are at Garden Street."],
  ["Hotel desk", "You are Daniel at the front desk of the Lakeside Hotel. A single room is 90 euros a night, a double 130, breakfast included. Check-in is from three o’clock. Help the guest to book, and ask for a name and the number of nights."],
  ["Night train", "You are a traveller on a night train to Lisbon who cannot sleep and is glad about company. You restore old clocks for a living and like to hear what others do."],
];
const VOICE_KINDS = { NATF: "natural, female", NATM: "natural, male", VARF: "varied, female", VARM: "varied, male" };
const NEW_PARAGRAPH_MS = 1600; // a longer silence between two words begins a new paragraph
const ROLE_MAX = 4000;

const $ = (id) => document.getElementById(id);
const waves = { agent: new Wave($("agent-wave"), "--agent"), you: new Wave($("you-wave"), "--you") };

let call = null; // the call that is being made or held
let audio = null;
let codec = null;

// What the server has to offer

function headers() {
  return $("key").value ? { Authorization: `Bearer ${$("key").value}` } : {};
}

async function list(path) {
  const answer = await fetch(path, { headers: headers() });
  const body = await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(body?.error?.message ?? `The server answered ${answer.status}.`);
  return body.data;
}

function describeVoice(id) {
  const match = /^([A-Z]{4})(\d+)$/.exec(id);
  return match && VOICE_KINDS[match[1]] ? `${id} · ${VOICE_KINDS[match[1]]}` : id;
}

async function loadOffer() {
  try {
    const [[model], voices] = await Promise.all([list("v1/models"), list("v1/voices")]);
    $("model").textContent = model.id;
    $("model").hidden = false;
    $("untrained").hidden = model.trained !== false;
    $("notice").textContent = model.notice ?? "";
    $("notice").hidden = !model.notice || model.trained === false;
    // What the server takes where a field is left empty; one that does not say so takes the published values.
    for (const [name, value] of Object.entries(model.sampling ?? {})) {
      const field = $(name.replace("top_k", "topk").replace("_", "-"));
      if (field) field.placeholder = value;
    }
    if (model.roles?.length) offerRoles(model.roles.map(({ name, text }) => [name, text]));
    const chosen = $("voice").value;
    $("voice").replaceChildren(...voices.map(({ id }) => new Option(describeVoice(id), id)));
    if (voices.some(({ id }) => id === chosen)) $("voice").value = chosen;
    $("voice").disabled = false;
    trouble("");
  } catch (error) {
    $("voice").replaceChildren(new Option("The server’s choice", ""));
    trouble(`The voices could not be loaded. ${error.message}`);
  }
}

// What the page says

function status(state, text) {
  $("status").dataset.state = state;
  $("status-text").textContent = text;
}

function trouble(message) {
  $("trouble").textContent = message;
  $("trouble").hidden = !message;
}

function figures({ seconds, delay, lag, gaps }) {
  $("clock").textContent = `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
  $("delay").textContent = delay == null ? "–" : `${Math.round(delay)} ms`;
  $("lag").textContent = lag == null ? "–" : `${Math.round(lag)} ms`;
  $("gaps").textContent = gaps;
}

function median(values) {
  return values.length ? [...values].sort((a, b) => a - b)[values.length >> 1] : null;
}

class Transcript {
  constructor() {
    this.paragraph = null;
    this.lastMs = -Infinity;
  }

  add(piece, seconds) {
    const now = performance.now();
    if (!this.paragraph || now - this.lastMs > NEW_PARAGRAPH_MS) {
      $("hint").hidden = true;
      const time = document.createElement("time");
      time.textContent = `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
      this.paragraph = document.createElement("p");
      this.paragraph.append(time);
      $("said").append(this.paragraph);
      piece = piece.trimStart();
    }
    this.lastMs = now;
    this.paragraph.append(piece);
    $("said").scrollTop = $("said").scrollHeight;
  }
}

// A call, from the click to its end

async function talk() {
  trouble("");
  call = { hangUp() {} }; // busy from here on
  controls();
  status("busy", "Asking for the microphone…");
  const held = { startedMs: null, lags: [], gaps: 0, transcript: new Transcript(), timer: 0, over: false };
  for (const wave of Object.values(waves)) wave.clear();
  $("said").replaceChildren($("hint"));
  $("hint").hidden = false;
  figures({ seconds: 0, gaps: 0 });
  try {
    await openSound(held);
  } catch (error) {
    const message = error instanceof SoundError ? error.message : `The sound could not be started. ${error.message}`;
    return over(held, { ok: false, message });
  }
  audio.setVolume(Number($("volume").value));
  status("busy", "Connecting…");
  paint();
  call = new Call(chatUrl(document.baseURI, query()), {
    connected: () => status("busy", "Preparing voice and role…"),
    ready: () => live(held),
    lost: () => {
      status("busy", "The connection broke – getting it back…");
      controls();
    },
    back: () => {
      codec?.restart();
      held.lags.length = 0;
      status("live", "Live – just talk");
      controls();
    },
    metadata: (content) => describe(content),
    audio: (payload) => codec?.decode(payload),
    text: (piece) => held.transcript.add(piece, (performance.now() - held.startedMs) / 1000),
    lag: (ms) => {
      held.lags.push(ms);
      if (held.lags.length > 40) held.lags.shift();
    },
    ended: (end) => over(held, end),
  });
  controls();
}

// Opus where the browser has it and the way is long; PCM16, which costs nobody anything, on the same machine.
async function openSound(held) {
  const wanted = $("sound").value || (/^(localhost|127\.|\[::1\])/.test(location.hostname) ? "pcm" : "opus");
  const open = (rate) =>
    openAudio({
      rate,
      onFrame: (frame) => call?.live && codec.encode(frame), // before the agent is ready nobody hears it
      onYourPeak: (peak) => waves.you.add(peak),
      onAgentPeak: (peak) => waves.agent.add(peak),
      onGap: () => held.startedMs && held.gaps++,
    });
  const ends = {
    onPayload: (payload) => call?.speak(payload),
    onSound: (sound) => audio?.play(sound),
    onError: (error) => call?.fail(`The browser’s Opus failed: ${error.message}`),
  };
  if (wanted === "opus" && (await opusWorks(OPUS_RATE))) {
    audio = await open(OPUS_RATE);
    if (audio.rate === OPUS_RATE || (await opusWorks(audio.rate))) {
      codec = new OpusCodec({ rate: audio.rate, ...ends });
      return;
    }
    await audio.close();
  }
  audio = await open(PCM_RATE);
  codec = new PcmCodec(ends);
}

function query() {
  return {
    voice_prompt: $("voice").value,
    text_prompt: $("role").value.trim(),
    seed: $("seed").value.trim(),
    text_temperature: $("text-temperature").value,
    text_topk: $("text-topk").value,
    audio_temperature: $("audio-temperature").value,
    audio_topk: $("audio-topk").value,
    api_key: $("key").value,
    audio: codec instanceof OpusCodec ? "opus" : "pcm",
    audio_rate: codec instanceof PcmCodec ? audio.rate : "",
  };
}

function live(held) {
  held.startedMs = performance.now();
  held.timer = setInterval(() => {
    const lag = median(held.lags);
    // A frame is spoken for 80 ms before it can leave; then the server's share; then the playback buffer.
    const delay = lag == null ? null : FRAME_MS + lag + audio.playbackMs();
    figures({ seconds: (performance.now() - held.startedMs) / 1000, delay, lag, gaps: held.gaps });
  }, 500);
  status("live", "Live – just talk");
  controls();
}

function describe(content) {
  if (!content.session) return;
  $("agent-what").textContent = describeVoice(content.voice.replace(/\.pt$/, ""));
  $("format").textContent = { opus: "Opus", pcm: "PCM" }[content.audio];
  $("used-seed").textContent = content.seed;
  $("used-seed").disabled = false;
}

async function over(held, { ok, message }) {
  if (held.over) return;
  held.over = true;
  clearInterval(held.timer);
  const closing = audio;
  codec?.close();
  call = audio = codec = null;
  status(ok ? "idle" : "bad", ok ? message : "Ended");
  trouble(ok ? "" : message);
  $("mute").setAttribute("aria-pressed", "false");
  controls();
  await closing?.close();
}

function controls() {
  $("setup").inert = Boolean(call);
  document.body.toggleAttribute("data-busy", Boolean(call));
  $("talk").textContent = call ? "End" : "Talk";
  $("talk").toggleAttribute("data-live", Boolean(call));
  $("mute").disabled = !call?.live;
  $("you-what").textContent = $("mute").getAttribute("aria-pressed") === "true" ? "muted" : "";
}

// Every other picture: 30 a second run smoothly and leave the processor to the sound.
function paint(count = 0) {
  if (count % 2) for (const wave of Object.values(waves)) wave.draw();
  if (audio) requestAnimationFrame(() => paint(count + 1));
}

// What the reader does

// A role that nobody has changed gives way to the first of the new ones.
function offerRoles(roles) {
  const untouched = $("role").value === "" || [...$("presets").children].some((chip) => chip.dataset.role === $("role").value);
  const chips = roles.map(([name, role]) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.textContent = name;
    chip.dataset.role = role;
    chip.onclick = () => {
      $("role").value = role;
      showRole();
    };
    return chip;
  });
  $("presets").replaceChildren(...chips);
  if (untouched) $("role").value = roles[0][1];
  showRole();
}

function showRole() {
  const length = $("role").value.length;
  $("role-count").textContent = length > ROLE_MAX * 0.8 ? `${length} / ${ROLE_MAX}` : "";
  $("role-count").classList.toggle("over", length > ROLE_MAX);
  for (const chip of $("presets").children) chip.setAttribute("aria-pressed", String(chip.dataset.role === $("role").value));
}

function darkOrLight(choice) {
  document.documentElement.dataset.theme = choice;
  for (const wave of Object.values(waves)) wave.restyle();
}

offerRoles(PRESETS);
$("role").oninput = showRole;

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const chosenTheme = () => localStorage.getItem("theme") ?? (systemDark.matches ? "dark" : "light");
darkOrLight(chosenTheme());
systemDark.onchange = () => darkOrLight(chosenTheme());
$("theme").onclick = () => {
  localStorage.setItem("theme", chosenTheme() === "dark" ? "light" : "dark");
  darkOrLight(chosenTheme());
};

$("setup").onsubmit = (event) => event.preventDefault();
$("talk").onclick = () => {
  if (!call) talk();
  else call.hangUp();
};
$("mute").onclick = () => {
  const muted = $("mute").getAttribute("aria-pressed") !== "true";
  $("mute").setAttribute("aria-pressed", String(muted));
  audio?.setMuted(muted);
  controls();
};
$("volume").oninput = () => audio?.setVolume(Number($("volume").value));
$("used-seed").onclick = () => {
  $("seed").value = $("used-seed").textContent;
  $("advanced").open = true;
};
$("key").onchange = loadOffer;
loadOffer();

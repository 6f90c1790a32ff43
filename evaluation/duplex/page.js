// A recording and its timeline move together: a click on the timeline plays from there, a line shows where it is.
for (const card of document.querySelectorAll(".conversation")) {
  const sound = card.querySelector("audio"), picture = card.querySelector(".scroll svg");
  const scroll = card.querySelector(".scroll"), line = picture.querySelector(".playhead");
  const left = Number(picture.dataset.left), scale = Number(picture.dataset.scale);
  const follow = () => {
    const x = left + sound.currentTime * scale;
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    if (sound.paused) return;
    if (x > scroll.scrollLeft + scroll.clientWidth - 40 || x < scroll.scrollLeft) scroll.scrollLeft = x - 40;
    requestAnimationFrame(follow);
  };
  sound.addEventListener("play", follow);
  sound.addEventListener("seeked", follow);
  const play = (seconds) => {
    sound.currentTime = Math.max(0, seconds);
    sound.play();
  };
  picture.addEventListener("click", (event) => {
    play((event.clientX - picture.getBoundingClientRect().left - left) / scale);
  });
  const whole = card.querySelector(".overview");
  whole.addEventListener("click", (event) => {
    const box = whole.getBoundingClientRect();
    const seconds = ((event.clientX - box.left) / box.width) * whole.viewBox.baseVal.width;
    scroll.scrollLeft = seconds * scale - scroll.clientWidth / 3;
    play(seconds);
  });
}

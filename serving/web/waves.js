// A waveform that runs from right to left: one rounded bar for each 20 ms, newest at the right edge.

const BAR_MS = 20;
const SPAN_MS = 6000;

export class Wave {
  constructor(canvas, colour) {
    this.canvas = canvas;
    this.colour = colour; // the name of a CSS custom property
    this.peaks = [];
    this.newest = 0; // time of the last peak
    this.inks = null; // read once: asking for a style makes the browser lay the page out
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  add(peak) {
    this.peaks.push(peak);
    if (this.peaks.length > SPAN_MS / BAR_MS + 10) this.peaks.shift();
    this.newest = performance.now();
  }

  // The page's colours have changed.
  restyle() {
    this.inks = null;
    this.draw();
  }

  clear() {
    this.peaks = [];
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    this.inks ??= ((style) => [style.getPropertyValue("--line"), style.getPropertyValue(this.colour)])(getComputedStyle(canvas));
    const [line, colour] = this.inks;
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = line;
    pen.fillRect(0, height / 2 - 0.5, width, 1);

    const step = (width * BAR_MS) / SPAN_MS;
    const bar = Math.max(1.5, step * 0.62);
    // Between two peaks the picture glides on, so that 50 peaks a second do not stutter at 60 pictures.
    const glide = this.still ? 0 : Math.min(1, (performance.now() - this.newest) / BAR_MS) * step;
    pen.fillStyle = colour;
    pen.beginPath();
    for (let i = this.peaks.length - 1, x = width - bar - glide + step; i >= 0 && x > -step; i--, x -= step) {
      const loud = Math.sqrt(this.peaks[i]); // quiet speech is to be seen as well
      const tall = Math.max(0, loud * (height - 6));
      if (tall > 1) pen.roundRect(x, (height - tall) / 2, bar, tall, bar / 2);
    }
    pen.fill();
  }
}

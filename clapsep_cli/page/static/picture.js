// Draws what is visible of a sound: its spectrogram with the waveform below, frequencies and times.
import { getPeaks, getPicture } from './api.js';
import { tick } from './times.js';

const BANDS = 128;
const LOWEST_HZ = 30;
const RANGE = 166; // of the 255 steps of a level, 65 dB, that are told apart
const PIECES = 4; // of the waveform in a column of the spectrogram
const WAVE = 0.24; // of the height, for the waveform
const RULER = 18; // pixels, for the times
const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400];
const HERTZ = [300, 1000, 3000, 10000];
const THEMES = {
  light: { ramp: ['#fbfaf7', '#eceef0', '#c3d0dd', '#8aa3c0', '#4d6490', '#1a2142'], wave: '#54616b', ink: '#4a5259', halo: '#fbfaf7' },
  dark: { ramp: ['#101214', '#191d33', '#34386a', '#6f6bab', '#bcb1dc', '#fdf8ff'], wave: '#9fb0bd', ink: '#b9c2c9', halo: '#101214' },
};

// 256 colours, as a canvas stores them.
function palette(ramp) {
  const stops = ramp.map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
  return Uint32Array.from({ length: 256 }, (_, level) => {
    const at = (level / 255) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    const [r, g, b] = stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
    return (255 << 24) | (b << 16) | (g << 8) | r;
  });
}

const PALETTES = Object.fromEntries(Object.entries(THEMES).map(([name, theme]) => [name, palette(theme.ramp)]));
const mel = (hz) => Math.log10(1 + hz / 700);

export class Picture {
  constructor(canvas, failed) {
    this.failed = failed; // is told what went wrong
    this.canvas = canvas;
    this.kept = new Map(); // by sound: its peaks, all of its picture, and the stretch that was last looked at
    this.dark = matchMedia('(prefers-color-scheme: dark)');
    this.dark.addEventListener('change', () => this.draw());
  }

  // `top` is the level that has the strongest colour: that of the mixture, so that parts compare.
  async show(sound, top) {
    [this.sound, this.top] = [sound, top];
    const kept = this.kept.get(sound.id) ?? { stretches: [] };
    this.kept.set(sound.id, kept);
    this.draw();
    const seconds = sound.frames / sound.rate;
    kept.peaks ??= getPeaks(sound.id);
    kept.whole ??= getPicture(sound.id, 0, seconds, 2000).then((levels) => ({ from: 0, to: seconds, levels }));
    try {
      [kept.pairs, kept.all] = await Promise.all([kept.peaks, kept.whole]);
    } catch (error) {
      if (this.kept.get(sound.id) === kept) throw error;
      return; // another recording was opened meanwhile
    }
    this.draw();
    this.look();
  }

  forget() {
    this.kept.clear();
    this.sound = null;
  }

  // What is visible, in seconds.
  move(from, to) {
    [this.from, this.to] = [from, to];
    this.draw();
    clearTimeout(this.later);
    this.later = setTimeout(() => this.look(), 60);
  }

  // Fetch the visible stretch in detail.
  async look() {
    if (!this.sound || !(this.to > this.from)) return;
    const { sound, from, to } = this;
    const kept = this.kept.get(sound.id);
    if (to - from > 0.8 * (sound.frames / sound.rate) || (kept.near?.from === from && kept.near?.to === to)) return;
    this.aborter?.abort();
    this.aborter = new AbortController();
    const margin = (to - from) / 4;
    const column = (PIECES * sound.piece) / sound.rate; // seconds: the server keeps whole columns
    const first = Math.max(0, Math.floor((from - margin) / column) * column);
    const last = Math.ceil(Math.min(sound.frames / sound.rate, to + margin) / column) * column;
    try {
      const levels = await getPicture(sound.id, first, last, 2400, this.aborter.signal);
      kept.near = { from: first, to: last, levels };
      this.draw();
    } catch (error) {
      if (error.name !== 'AbortError') this.failed(error);
    }
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.paint());
  }

  paint() {
    const { canvas } = this;
    const [width, height, scale] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio];
    if (!this.sound || !width) return;
    [canvas.width, canvas.height] = [width * scale, height * scale];
    const context = canvas.getContext('2d');
    context.scale(scale, scale);
    const name = this.dark.matches ? 'dark' : 'light';
    const theme = THEMES[name];
    context.fillStyle = theme.ramp[0];
    context.fillRect(0, 0, width, height);
    const kept = this.kept.get(this.sound.id);
    const seen = height - RULER;
    for (const piece of [kept.all, kept.near]) if (piece) this.paintLevels(context, piece, name, width, seen * (1 - WAVE));
    if (kept.pairs) this.paintWave(context, kept.pairs, theme, width, seen * (1 - WAVE), seen);
    this.paintHertz(context, theme, seen * (1 - WAVE));
    this.paintTimes(context, theme, width, height);
  }

  paintLevels(context, piece, name, width, height) {
    const tone = `${name} ${this.top}`;
    if (piece.tone !== tone) [piece.image, piece.tone] = [this.coloured(piece.levels, PALETTES[name]), tone];
    const pixels = width / (this.to - this.from);
    context.imageSmoothingQuality = 'high';
    context.drawImage(piece.image, (piece.from - this.from) * pixels, 0, (piece.to - piece.from) * pixels, height);
  }

  coloured(levels, colours) {
    const columns = levels.length / BANDS;
    const image = new OffscreenCanvas(columns, BANDS);
    const context = image.getContext('2d');
    const data = context.createImageData(columns, BANDS);
    const pixels = new Uint32Array(data.data.buffer);
    const low = this.top - RANGE;
    for (let column = 0; column < columns; column++) {
      for (let band = 0; band < BANDS; band++) {
        const level = Math.max(0, Math.min(255, ((levels[column * BANDS + band] - low) * 255) / RANGE));
        pixels[(BANDS - 1 - band) * columns + column] = colours[Math.round(level)];
      }
    }
    context.putImageData(data, 0, 0);
    return image;
  }

  paintWave(context, pairs, theme, width, top, bottom) {
    const middle = (top + bottom) / 2;
    const half = (bottom - top) / 2 - 3;
    context.fillStyle = theme.wave;
    const perSecond = this.sound.rate / this.sound.piece;
    const perPixel = ((this.to - this.from) * perSecond) / width;
    for (let x = 0; x < width; x++) {
      const first = Math.floor(this.from * perSecond + x * perPixel);
      const last = Math.min(pairs.length / 2, Math.max(first + 1, Math.floor(first + perPixel)));
      let [low, high] = [0, 0];
      for (let i = Math.max(0, first); i < last; i++) {
        low = Math.min(low, pairs[2 * i]);
        high = Math.max(high, pairs[2 * i + 1]);
      }
      const tall = Math.max(1, ((high - low) / 127) * half);
      context.fillRect(x, middle - (high / 127) * half, 1, tall);
    }
  }

  paintHertz(context, theme, height) {
    const top = mel(this.sound.rate / 2);
    const low = mel(LOWEST_HZ);
    for (const hz of HERTZ.filter((each) => mel(each) < top - 0.03)) {
      const y = height * (1 - (mel(hz) - low) / (top - low));
      write(context, theme, hz >= 1000 ? `${hz / 1000}k` : String(hz), 5, y + 4);
    }
  }

  paintTimes(context, theme, width, height) {
    const pixels = width / (this.to - this.from);
    const step = STEPS.find((each) => each * pixels >= 72) ?? STEPS.at(-1);
    context.fillStyle = theme.ink;
    for (let time = Math.ceil(this.from / step) * step; time <= this.to; time += step) {
      const x = (time - this.from) * pixels;
      context.fillRect(Math.round(x), height - RULER, 1, 4);
      if (x < width - 30) write(context, theme, tick(time, step), x + 4, height - 5);
    }
  }
}

function write(context, theme, text, x, y) {
  context.font = '11px system-ui, sans-serif';
  context.lineWidth = 3;
  context.strokeStyle = theme.halo;
  context.globalAlpha = 0.75;
  context.strokeText(text, x, y);
  context.globalAlpha = 1;
  context.fillStyle = theme.ink;
  context.fillText(text, x, y);
}

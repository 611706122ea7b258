// Plays the parts of one recording at one cursor. The mixture is the sum of its parts, so to hear another part, or
// something between, only gains change. To wavesurfer it looks like a media element.
import { getSamples } from './api.js';

const SIZE = 1 << 16; // samples of a block
const AHEAD = 4; // blocks that are fetched before they are needed
const FADE = 0.008; // seconds, so that nothing clicks
const PATIENCE = 4000; // milliseconds, for the browser to open its sound device
const LEAD = 0.03; // seconds from the wish to play until the first sample

// Some parts to be played together: fetches their blocks and hands them to the audio thread.
class Deck {
  constructor(player, parts) {
    this.player = player;
    this.parts = parts;
    this.context = player.context;
    this.aborter = new AbortController();
    this.node = new AudioWorkletNode(this.context, 'parts', {
      numberOfInputs: 0,
      numberOfOutputs: parts.length,
      outputChannelCount: parts.map(() => 2),
      processorOptions: { size: SIZE },
    });
    this.fader = new GainNode(this.context, { gain: 0 });
    this.fader.connect(this.context.destination);
    this.gains = parts.map((part, index) => {
      const gain = new GainNode(this.context, { gain: player.gainOf(part, index) });
      this.node.connect(gain, index).connect(this.fader);
      return gain;
    });
    this.blocks = new Map(); // by number: a promise, until its samples were handed over
  }

  fetchBlock(number) {
    if (number * SIZE >= this.player.frames || this.blocks.has(number)) return this.blocks.get(number);
    const { signal } = this.aborter;
    const fetched = Promise.all(this.parts.map((part) => getSamples(part.id, number * SIZE, SIZE, signal)));
    const sent = fetched.then((parts) => {
      const block = parts.map((samples, index) => apart(samples, this.parts[index].channels));
      this.node.port.postMessage({ number, block }, block.flat().map((channel) => channel.buffer));
    });
    this.blocks.set(number, sent);
    return sent;
  }

  // Have the sample `from` heard at the frame `begin` of the context; resolves once its block is there.
  async prepare(from) {
    const number = Math.floor(from / SIZE);
    await Promise.all([this.fetchBlock(number), from % SIZE > SIZE / 2 ? this.fetchBlock(number + 1) : null]);
    this.feed(from);
  }

  feed(from) {
    const number = Math.floor(from / SIZE);
    for (let ahead = 0; ahead < AHEAD; ahead++) this.fetchBlock(number + ahead)?.catch((error) => this.player.fail(error));
    for (const old of this.blocks.keys()) if (old < number - 1) this.blocks.delete(old);
  }

  start(from, begin) {
    this.node.port.postMessage({ from, begin });
    const when = begin / this.context.sampleRate;
    this.fader.gain.setValueAtTime(0, when);
    this.fader.gain.linearRampToValueAtTime(1, when + FADE);
  }

  // Fade out from the frame `end` of the context on, and let go of everything.
  stop(end) {
    const { sampleRate, currentTime } = this.context;
    const when = Math.max(end / sampleRate, currentTime);
    this.aborter.abort();
    this.fader.gain.cancelScheduledValues(when);
    this.fader.gain.setValueAtTime(1, when);
    this.fader.gain.linearRampToValueAtTime(0, when + FADE);
    this.node.port.postMessage({ end: Math.ceil((when + FADE) * sampleRate) });
    setTimeout(() => {
      this.node.port.postMessage({ over: true });
      this.fader.disconnect();
    }, 1000 * (when + FADE - currentTime) + 200);
  }
}

export class Player extends EventTarget {
  constructor() {
    super();
    this.parts = [];
    this.heard = -1; // the part that is heard, -1 for all of them
    this.bleed = 0; // how much of the other parts is heard with it
    this.deck = null;
    this.frames = 0;
    this.rate = 48000;
    this.resting = 0; // seconds: the cursor while nothing plays
    this.until = Infinity; // seconds
    this.turn = 0; // counts what was asked for, so that only the last of it happens
  }

  // A recording of `frames` samples at `rate` Hz, of which `parts` ({id, channels}) are played.
  async open(rate, frames, parts) {
    this.pause();
    await this.context?.close();
    this.context = new AudioContext({ sampleRate: rate, latencyHint: 'interactive' });
    [this.rate, this.frames, this.parts, this.heard] = [rate, frames, parts, -1];
    this.resting = 0;
    this.ready = this.context.audioWorklet.addModule('/static/output.js');
    this.tell('durationchange', 'timeupdate');
  }

  // Other parts of the same recording; while it plays, without a gap. The part of the same name is heard on.
  async setParts(parts, heard = this.sameAmong(parts)) {
    [this.parts, this.heard] = [parts, heard];
    if (!this.paused) await this.begin(null);
  }

  sameAmong(parts) {
    const { name } = this.parts[this.heard] ?? {};
    return this.heard < 0 ? -1 : Math.max(0, parts.findIndex((part) => part.name === name));
  }

  hear(heard) {
    this.heard = heard;
    this.applyGains();
  }

  setBleed(bleed) {
    this.bleed = bleed;
    this.applyGains();
  }

  gainOf(part, index) {
    if (this.heard < 0 || index === this.heard) return 1;
    return this.parts[this.heard].name === 'residual' ? 0 : this.bleed;
  }

  applyGains() {
    this.deck?.gains.forEach((gain, index) => {
      gain.gain.setTargetAtTime(this.gainOf(this.parts[index], index), this.context.currentTime, FADE / 2);
    });
  }

  async play() {
    if (!this.context || !this.paused) return;
    if (this.currentTime >= this.duration - 0.01) this.resting = 0;
    await this.begin(this.resting);
  }

  playStretch(start, end) {
    this.until = Infinity;
    this.currentTime = start;
    this.until = end;
    return this.play();
  }

  // Play from `time` on, or, where it is null, go on with other parts from wherever the cursor will be.
  async begin(time) {
    if (!this.deck) time ??= this.resting;
    const turn = ++this.turn;
    const wasPaused = this.paused;
    this.starting = true;
    if (wasPaused) this.tell('play');
    try {
      await this.ready;
      await this.wake();
      const deck = new Deck(this, this.parts);
      const soon = time === null ? this.position + LEAD * this.rate : Math.round(time * this.rate);
      await deck.prepare(Math.floor(soon));
      if (turn !== this.turn) {
        deck.stop(0);
        return;
      }
      const begin = Math.ceil((this.context.currentTime + LEAD) * this.rate);
      const from = time === null ? Math.round(this.from + begin - this.beginFrame) : soon;
      deck.start(from, begin);
      this.deck?.stop(begin);
      [this.deck, this.from, this.beginFrame] = [deck, from, begin];
      this.follow();
    } catch (error) {
      if (turn === this.turn) this.fail(error);
    } finally {
      if (turn === this.turn) this.starting = false;
    }
  }

  // Browsers begin to play only once somebody has pressed something, and never where no device plays sound.
  async wake() {
    const woken = this.context.resume().then(() => true);
    const late = new Promise((done) => setTimeout(done, PATIENCE));
    if (!(await Promise.race([woken, late]))) throw new Error('The browser plays no sound: is there a device for it?');
  }

  // Keep the deck fed and the cursor told, as long as it plays.
  follow() {
    cancelAnimationFrame(this.tick);
    clearInterval(this.timer);
    const step = () => {
      this.tell('timeupdate');
      if (this.deck) this.tick = requestAnimationFrame(step);
    };
    const feed = () => {
      if (!this.deck) return;
      if (this.position >= Math.min(this.frames, this.until * this.rate)) this.end();
      else this.deck.feed(Math.max(0, Math.floor(this.position)));
    };
    this.timer = setInterval(feed, 60); // goes on while the page is hidden
    step();
  }

  end() {
    const stretch = this.until < Infinity;
    const at = stretch ? this.until : this.duration;
    this.pause();
    this.resting = at;
    this.until = Infinity;
    this.tell('timeupdate', stretch ? 'pause' : 'ended');
  }

  pause() {
    if (this.paused) return;
    this.turn++;
    this.resting = this.currentTime;
    this.starting = false;
    clearInterval(this.timer);
    cancelAnimationFrame(this.tick);
    this.deck?.stop(0);
    this.deck = null;
    this.tell('pause', 'timeupdate');
  }

  fail(error) {
    if (error.name === 'AbortError') return;
    this.pause();
    this.dispatchEvent(new CustomEvent('failed', { detail: error }));
  }

  tell(...events) {
    for (const event of events) this.dispatchEvent(new Event(event));
  }

  // The sample that is being computed now, while it plays.
  get position() {
    return this.from + this.context.currentTime * this.rate - this.beginFrame;
  }

  // What a media element has.

  get currentTime() {
    if (!this.deck) return this.resting;
    const heard = this.position / this.rate - (this.context.outputLatency || 0); // later, by way of Bluetooth say
    return Math.min(Math.max(heard, this.from / this.rate), this.duration);
  }

  set currentTime(time) {
    this.resting = Math.min(Math.max(0, time), this.duration);
    this.until = Infinity;
    if (!this.paused) this.begin(this.resting);
    this.tell('seeking', 'timeupdate', 'seeked');
  }

  get paused() {
    return !this.deck && !this.starting;
  }

  get duration() {
    return this.frames / this.rate;
  }

  get ended() {
    return this.paused && this.resting >= this.duration;
  }

  volume = 1;
  muted = false;
  playbackRate = 1;
  seeking = false;
  src = '';
  currentSrc = '';
  canPlayType = () => '';
  removeAttribute() {}
  load() {}
  remove() {}
}

function apart(samples, channels) {
  if (channels === 1) return [samples];
  const sides = [new Float32Array(samples.length / 2), new Float32Array(samples.length / 2)];
  for (let i = 0; i < samples.length; i++) sides[i & 1][i >> 1] = samples[i];
  return sides;
}

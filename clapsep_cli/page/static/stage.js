// The recording to look at: zoom, cursor, and stretches to keep and to leave.
import RegionsPlugin from './regions.js';
import WaveSurfer from './wavesurfer.js';
import { Picture } from './picture.js';
import { clock } from './times.js';

const COLOURS = { keep: 'rgb(47 160 95 / 26%)', leave: 'rgb(205 60 50 / 26%)' };
const CLOSEST = 400; // pixels for a second
const WIDEST = 8e6; // pixels for all; browsers draw no wider
const LEAST = 0.05; // seconds of a stretch

export class Stage extends EventTarget {
  constructor(player) {
    super();
    this.player = player;
    this.box = document.querySelector('#stage');
    this.picture = new Picture(document.querySelector('#picture'), (error) => this.emit('failed', error));
    this.brush = 'keep';
    this.player.addEventListener('timeupdate', () => this.tell());
    this.box.addEventListener('wheel', (event) => this.wheel(event), { passive: false });
    this.box.addEventListener('pointerdown', (event) => this.choose(event.shiftKey), { capture: true });
  }

  // Begin with another recording.
  open(sound) {
    this.waves?.destroy();
    this.picture.forget();
    this.seconds = sound.frames / sound.rate;
    this.top = sound.loudest;
    this.regions = RegionsPlugin.create();
    this.waves = WaveSurfer.create({
      container: '#waves',
      height: this.box.clientHeight,
      media: this.player,
      peaks: [[0, 0]],
      duration: this.seconds,
      cursorColor: 'var(--cursor)',
      cursorWidth: 2,
      renderFunction: () => {}, // the picture lies below
      cspNonce: document.querySelector('meta[name=nonce]').content,
      plugins: [this.regions],
    });
    for (const event of ['ready', 'redraw', 'scroll', 'zoom', 'resize']) this.waves.on(event, () => this.look());
    this.regions.on('region-created', (region) => this.created(region));
    this.regions.on('region-updated', (region) => this.changed(region));
    this.regions.on('region-clicked', (region) => this.emit('picked', { id: region.id }));
    [this.pixels, this.dragging, this.undrag] = [0, null, null];
    this.choose(false);
    this.box.setAttribute('aria-valuemax', this.seconds.toFixed(1));
    this.tell();
    return this.show(sound);
  }

  show(sound) {
    this.look();
    return this.picture.show(sound, this.top);
  }

  // What dragging marks from now on; with Shift the other.
  choose(other) {
    const side = other ? { keep: 'leave', leave: 'keep' }[this.brush] : this.brush;
    if (side === this.dragging || !this.regions) return;
    this.undrag?.();
    this.dragging = side;
    this.undrag = this.regions.enableDragSelection({ color: COLOURS[side], id: undefined, minLength: LEAST });
  }

  setBrush(side) {
    this.brush = side;
    this.choose(false);
  }

  created(region) {
    if (this.adding) return;
    const side = this.dragging;
    region.setOptions({ id: crypto.randomUUID() });
    this.label(region, side);
    this.emit('marked', { id: region.id, side, start: region.start, end: region.end });
  }

  changed(region) {
    this.emit('moved', { id: region.id, start: region.start, end: region.end });
  }

  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  label(region, side) {
    region.setOptions({ color: COLOURS[side] });
    region.element?.setAttribute('part', `region ${side}`);
  }

  // Have a stretch of that id shown as it is.
  mark({ id, side, start, end }) {
    let region = this.regions.getRegions().find((each) => each.id === id);
    if (!region) {
      this.adding = true;
      region = this.regions.addRegion({ id, start, end, minLength: LEAST });
      this.adding = false;
    }
    region.setOptions({ start, end });
    this.label(region, side);
  }

  unmark(id) {
    this.regions?.getRegions().find((each) => each.id === id)?.remove();
  }

  look() {
    if (!this.waves) return;
    const width = this.waves.getWrapper().clientWidth || 1;
    const from = (this.waves.getScroll() / width) * this.seconds;
    this.picture.move(from, Math.min(this.seconds, from + (this.box.clientWidth / width) * this.seconds));
  }

  get fitting() {
    return this.box.clientWidth / this.seconds;
  }

  zoom(factor, anchor = this.player.currentTime) {
    const now = Math.max(this.pixels, this.fitting);
    const at = anchor * now - this.waves.getScroll(); // where it is on the screen
    const pixels = Math.min(now * factor, Math.max(CLOSEST, this.fitting), WIDEST / this.seconds);
    this.pixels = pixels <= this.fitting * 1.001 ? 0 : pixels;
    this.waves.zoom(this.pixels);
    if (this.pixels) this.waves.setScroll(anchor * this.pixels - Math.min(Math.max(0, at), this.box.clientWidth));
    this.look();
  }

  fit() {
    this.pixels = 0;
    this.waves.zoom(0);
    this.look();
  }

  wheel(event) {
    if (!(event.ctrlKey || event.metaKey) || !this.waves) return;
    event.preventDefault();
    const width = this.waves.getWrapper().clientWidth;
    const x = event.clientX - this.box.getBoundingClientRect().left + this.waves.getScroll();
    this.zoom(Math.exp(-event.deltaY / 250), (x / width) * this.seconds);
  }

  // The position in words, for those who do not see it.
  tell() {
    const time = this.player.currentTime;
    this.box.setAttribute('aria-valuenow', time.toFixed(1));
    this.box.setAttribute('aria-valuetext', `${clock(time)} of ${clock(this.player.duration)}`);
  }
}

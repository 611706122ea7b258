// What to keep and what to leave: words, examples, and stretches of the recording.
import { addShot, removeShot } from './api.js';
import { button, make } from './dom.js';
import { parse, short } from './times.js';

const SIGNS = { text: '“”', shot: '♪', span: '↔' };
const OTHER = { keep: 'leave', leave: 'keep' };

export class Query extends EventTarget {
  constructor(form, player) {
    super();
    this.form = form;
    this.player = player;
    this.items = []; // {id, side, kind, text | shot, label | start, end, name}
    this.several = form.querySelector('#several');
    this.several.addEventListener('change', () => this.render());
    for (const box of form.querySelectorAll('.side')) {
      const { side } = box.dataset;
      const [words] = box.querySelectorAll('input[type=text]');
      words.addEventListener('keydown', (event) => {
        if (event.key !== 'Enter' || event.ctrlKey || event.metaKey || !words.value.trim()) return;
        event.preventDefault();
        this.takeWords(words, side);
      });
      const files = box.querySelector('input[type=file]');
      files.addEventListener('change', async () => {
        await this.addFiles([...files.files], side);
        files.value = '';
      });
    }
  }

  takeWords(input, side) {
    const text = input.value.trim();
    input.value = '';
    if (text && !this.items.some((item) => item.side === side && item.text === text)) {
      this.add({ id: crypto.randomUUID(), side, kind: 'text', text, name: nameOf(text) });
    }
  }

  async addFiles(files, side) {
    for (const file of files) {
      try {
        const { shots } = await addShot(file);
        const { id, name } = shots.at(-1);
        this.add({ id, side, kind: 'shot', label: name, name: nameOf(name.replace(/\.[^.]*$/, '')) });
      } catch (error) {
        this.emit('failed', error);
      }
    }
  }

  addSpan(id, side, start, end) {
    this.add({ id, side, kind: 'span', start: rounded(start), end: rounded(end), name: nameOf(`at ${short(start)} s`) });
  }

  add(item) {
    this.items.push(item);
    this.render();
    this.emit('changed', item);
  }

  move(id, start, end) {
    const item = this.items.find((each) => each.id === id);
    if (item) Object.assign(item, { start: rounded(start), end: rounded(end) });
    this.render();
  }

  remove(item) {
    this.items = this.items.filter((each) => each !== item);
    if (item.kind === 'shot') removeShot(item.id).catch((error) => this.emit('failed', error));
    this.render();
    this.emit('removed', item);
    this.form.querySelector(`.${item.side} input`).focus();
  }

  // Stretches belong to the recording that was open.
  clearSpans() {
    this.items = this.items.filter((item) => item.kind !== 'span');
    this.render();
  }

  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  render() {
    for (const side of ['keep', 'leave']) {
      const list = this.form.querySelector(`.${side} ul`);
      list.replaceChildren(...this.items.filter((item) => item.side === side).map((item) => this.row(item)));
    }
    const kept = this.items.filter((item) => item.side === 'keep').length;
    this.form.querySelector('#several-label').hidden = kept < 2 && !this.several.checked;
  }

  row(item) {
    const label = item.text ?? item.label ?? `stretch from ${short(item.start)} s`;
    const row = make('li', { id: `item-${item.id}` }, make('span', { className: 'sign', ariaHidden: 'true' }, SIGNS[item.kind]));
    if (item.kind === 'span') {
      const [start, end] = ['start', 'end'].map((edge) => this.timeInput(item, edge));
      row.append(start, '–', end, 's');
      row.append(button('▶', `Play ${label}`, () => this.player.playStretch(item.start, item.end)));
    } else {
      row.append(make('span', { className: 'words', title: label }, label));
    }
    if (item.side === 'keep' && this.several.checked) {
      const name = make('input', { type: 'text', className: 'name', value: item.name, maxLength: 60, ariaLabel: `Name of the target ${label}` });
      name.addEventListener('change', () => (item.name = name.value));
      row.append(make('span', { className: 'pair' }, make('span', { className: 'faint' }, 'as'), name));
    }
    const other = OTHER[item.side];
    const acts = [button('⇄', `Move ${label} to ${other}`, () => this.flip(item)), button('✕', `Remove ${label}`, () => this.remove(item))];
    row.append(make('span', { className: 'pair acts' }, ...acts));
    return row;
  }

  flip(item) {
    item.side = OTHER[item.side];
    this.render();
    this.emit('changed', item);
  }

  timeInput(item, edge) {
    const input = make('input', { type: 'text', className: 'time', inputMode: 'decimal', value: short(item[edge]), ariaLabel: `${edge} of the stretch, in seconds` });
    input.addEventListener('change', () => {
      const time = parse(input.value);
      const changed = { ...item, [edge]: time };
      if (time >= 0 && changed.start < changed.end && changed.end <= this.player.duration + 0.01) item[edge] = time;
      this.render();
      this.emit('changed', item);
    });
    return input;
  }

  // As the server takes it; `how` is the model, and whether to refine.
  wish(how) {
    for (const side of ['keep', 'leave']) this.takeWords(this.form.elements[side], side);
    const kept = this.items.filter((item) => item.side === 'keep');
    const targets = this.several.checked && kept.length > 1
      ? kept.map((item) => ({ name: item.name, ...sides([item]) }))
      : [{ name: 'target', ...sides(kept) }];
    return { ...how, targets, leave: sides(this.items.filter((item) => item.side === 'leave')) };
  }
}

const rounded = (seconds) => Math.round(seconds * 100) / 100;

function sides(items) {
  const of = (kind) => items.filter((item) => item.kind === kind);
  return {
    texts: of('text').map((item) => item.text),
    shots: of('shot').map((item) => item.id),
    spans: of('span').map((item) => [item.start, item.end]),
  };
}

// A name that files can have.
function nameOf(text) {
  return text.replace(/[<>:"/\\|?*=\s\p{C}]+/gu, '_').replace(/^[-._~]+|[._]+$/g, '').slice(0, 40) || 'target';
}

// The list of what was extracted: to hear, to compare, to download.
import { cancel, fileOf, removeAttempt } from './api.js';
import { find, make } from './dom.js';

const LABELS = { target: 'Target', residual: 'Rest', mixture: 'Mixture' };
export const labelOf = (name) => LABELS[name] ?? name;

export class Attempts extends EventTarget {
  constructor() {
    super();
    this.list = find('#attempts ol');
    this.shown = '';
    this.current = null; // ids
    this.previous = null;
  }

  get attempt() {
    return this.all?.find((each) => each.id === this.current) ?? null;
  }

  choose(id) {
    if (id === this.current) return;
    [this.previous, this.current] = [this.current, id];
    this.render(this.all);
    this.dispatchEvent(new Event('chosen'));
  }

  // Back to the attempt that was heard before.
  swap() {
    if (this.all?.some((each) => each.id === this.previous)) this.choose(this.previous);
  }

  forget() {
    [this.current, this.previous] = [null, null];
  }

  render(all) {
    this.all = all;
    if (this.current && !this.attempt) {
      this.current = null;
      this.dispatchEvent(new Event('chosen'));
    }
    const shown = JSON.stringify([all, this.current, this.previous]);
    if (shown === this.shown) return;
    this.shown = shown;
    const focused = document.activeElement?.dataset?.key;
    this.list.replaceChildren(...all.toReversed().map((attempt) => this.row(attempt, all.indexOf(attempt) + 1)));
    if (focused) this.list.querySelector(`[data-key="${focused}"]`)?.focus();
    find('#no-attempts').hidden = all.length > 0;
  }

  row(attempt, number) {
    const { id, state } = attempt;
    const done = state === 'done';
    const row = make('li', { className: `attempt ${state}` });
    row.classList.toggle('current', id === this.current);
    const title = make(done ? 'button' : 'p', { className: 'title' }, `${number}. ${attempt.summary}`);
    if (done) {
      title.dataset.key = `hear ${id}`;
      title.ariaPressed = String(id === this.current);
      title.title = 'Hear this attempt';
      title.addEventListener('click', () => this.choose(id));
    }
    row.append(title);
    if (id === this.previous && done) row.append(make('kbd', { title: 'B goes back to this one' }, 'B'));
    row.append(...(done ? this.finished(attempt) : this.unfinished(attempt)));
    return row;
  }

  finished(attempt) {
    const facts = attempt.parts.filter((part) => part.presence && part.presence.score !== null).map((part) => {
      const name = attempt.parts.length > 2 ? `${labelOf(part.name)}: ` : 'What was asked for is ';
      return make('p', { className: 'presence', title: `presence ${part.presence.score.toFixed(2)}` }, name + part.presence.words);
    });
    const notes = attempt.notes.map((note) => make('p', { className: 'faint' }, note));
    const links = attempt.parts.map((part) =>
      make('a', { href: fileOf(part.id), download: part.file, title: `Download ${part.file}` }, `↓ ${labelOf(part.name)}`));
    const model = make('span', { className: 'faint' }, `${attempt.model}, ${attempt.refined ? 'two passes, ' : ''}${attempt.elapsed} s`);
    const actions = make('p', { className: 'actions' }, ...links, this.copier(attempt), this.remover(attempt, 'Remove'), make('span', { className: 'grow' }), model);
    return [...facts, ...notes, actions];
  }

  unfinished(attempt) {
    const { id, state } = attempt;
    if (state === 'failed') return [make('p', { className: 'error' }, attempt.error), make('p', { className: 'actions' }, this.remover(attempt, 'Remove'))];
    if (state === 'stopped') return [make('p', { className: 'actions faint' }, 'Cancelled. ', this.remover(attempt, 'Remove'))];
    const bar = make('progress', { max: 1, ariaLabel: 'Extracting' });
    if (attempt.done) bar.value = attempt.done;
    const stop = make('button', { type: 'button', className: 'link' }, 'Cancel');
    stop.dataset.key = `cancel ${id}`;
    stop.addEventListener('click', () => this.act(cancel(id)));
    const told = attempt.done >= 1 ? 'drawing' : attempt.done ? `${Math.floor(attempt.done * 100)} %` : 'loading the model';
    return [make('p', { className: 'actions' }, bar, make('span', { className: 'faint' }, told), stop)];
  }

  copier(attempt) {
    const copy = make('button', { type: 'button', className: 'link' }, 'Copy command');
    copy.dataset.key = `copy ${attempt.id}`;
    copy.title = attempt.command;
    copy.addEventListener('click', async () => {
      await navigator.clipboard.writeText(attempt.command);
      copy.textContent = 'Copied';
      setTimeout(() => (copy.textContent = 'Copy command'), 1500);
    });
    return copy;
  }

  remover({ id }, words) {
    const remove = make('button', { type: 'button', className: 'link' }, words);
    remove.addEventListener('click', () => this.act(removeAttempt(id)));
    return remove;
  }

  act(request) {
    request.then(
      (state) => this.dispatchEvent(new CustomEvent('state', { detail: state })),
      (error) => this.dispatchEvent(new CustomEvent('failed', { detail: error })),
    );
  }
}

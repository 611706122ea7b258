// The page: keeps what is shown in step with the server's state, and what is heard in step with what is shown.
import { chooseTrack, extract, getState, openRecording } from './api.js';
import { Attempts, labelOf } from './attempts.js';
import { find, make } from './dom.js';
import { listenToKeys } from './keys.js';
import { Player } from './player.js';
import { Query } from './query.js';
import { Stage } from './stage.js';
import { clock } from './times.js';

export const player = new Player();
export const stage = new Stage(player);
export const query = new Query(find('#ask'), player);
export const attempts = new Attempts();
const OFTEN = 250; // milliseconds between looks at the server while something is under way
let state = null;
let opened = null; // the id of the recording that is shown
let pending = null; // a mark that was begun: {side, start}

export function say(words) {
  find('#spoken').textContent = words;
}

function banner(words) {
  find('#banner').textContent = words;
  find('#banner').hidden = !words;
}

function wrong(words) {
  find('#wrong').textContent = words;
  find('#wrong').hidden = !words;
}

const busy = (attempt) => attempt.state === 'waiting' || attempt.state === 'working';

async function refresh() {
  try {
    take(await getState());
  } catch (error) {
    fail(error, banner);
  }
}

const sounds = () => [state.recording, ...state.attempts.flatMap((attempt) => attempt.parts)].map((sound) => sound?.id);

// Tell what went wrong, where it belongs; nothing can be done any more once the server has ended. What fails because
// its sound was removed meanwhile is not told.
async function fail(error, tell) {
  if (error.sound) {
    await refresh();
    if (!sounds().includes(error.sound)) return;
  }
  if (error.ended) find('main').inert = true;
  (error.ended ? banner : tell)(error.message);
}

let timer;
function take(told) {
  const before = state;
  state = told;
  const { recording } = state;
  if (recording?.id !== opened) stage.picture.forget();
  find('#empty').hidden = Boolean(recording) && recording.state !== 'failed';
  find('#reading').hidden = recording?.state !== 'working';
  find('#work').hidden = recording?.state !== 'done';
  if (recording?.state === 'working') showReading(recording);
  if (recording?.state === 'failed') banner(recording.error);
  if (recording?.state === 'done' && recording.id !== opened) showRecording(recording);
  showModels();
  attempts.render(state.attempts);
  const running = state.attempts.some(busy);
  find('#extract').disabled = running;
  for (const attempt of state.attempts) {
    const earlier = before?.attempts.find((each) => each.id === attempt.id);
    if (earlier && busy(earlier) && !busy(attempt)) finished(attempt);
  }
  clearTimeout(timer);
  if (running || recording?.state === 'working') timer = setTimeout(refresh, OFTEN);
}

function showReading(recording) {
  find('#reading-name').textContent = `Reading ${recording.name}`;
  find('#reading-done').value = recording.done;
}

async function showRecording(recording) {
  opened = recording.id;
  find('#name').textContent = document.title = recording.name;
  const sides = recording.channels > 1 ? 'stereo' : 'mono';
  find('#facts').textContent = `${clock(recording.frames / recording.rate)} · ${recording.rate / 1000} kHz · ${sides}`;
  find('#track-label').hidden = recording.tracks.length < 2;
  find('#track').replaceChildren(...recording.tracks.map((track, index) =>
    make('option', { value: index + 1, selected: index + 1 === recording.track }, `${index + 1}: ${track}`)));
  banner('');
  attempts.forget();
  query.clearSpans();
  await player.open(recording.rate, recording.frames, [recording]);
  await stage.open(recording);
  showListening();
}

function showModels() {
  const select = find('#model');
  const wanted = JSON.stringify(state.models);
  if (select.dataset.shown === wanted) return;
  select.dataset.shown = wanted;
  const named = select.value || state.model;
  select.replaceChildren(...state.models.map(({ name, here }) =>
    make('option', { value: name, disabled: !here, selected: name === named }, here ? name : `${name} (clapsep models download ${name})`)));
  showAbilities();
}

// What the chosen model takes; a side that it has no use for is out of use.
function showAbilities() {
  const model = state.models.find(({ name }) => name === find('#model').value);
  const able = (kind) => model.takes.includes(kind);
  const leaves = able('negatives') || able('prompts');
  const lacks = [...(able('audio') ? [] : ['no examples and no stretches']), ...(leaves ? [] : ['nothing to leave'])];
  find('.side.leave').disabled = !leaves;
  find('#takes').hidden = !lacks.length;
  find('#takes').textContent = `${model.name} takes ${able('prompts') ? 'names of prompts' : 'words'} alone: ${lacks.join(', ')}.`;
}
find('#model').addEventListener('change', showAbilities);

function finished(attempt) {
  if (attempt.state === 'failed') wrong(attempt.error);
  if (attempt.state !== 'done') return say(`Extraction ${attempt.state}`);
  const told = attempt.parts.filter((part) => part.presence).map((part) => `${labelOf(part.name)} ${part.presence.words}`);
  say(`Extraction done. ${told.join(', ')}`);
  attempts.choose(attempt.id);
}

// The switch between mixture, targets and rest, and the picture of what is chosen.

const parts = () => attempts.attempt?.parts ?? [];

export function hear(index) {
  if (index >= parts().length) return;
  player.hear(index);
  showListening();
}

function showListening() {
  if (state.recording.id !== opened) return; // another one is being read
  const names = ['mixture', ...parts().map((part) => part.name)];
  find('#listen').replaceChildren(...names.map((name, index) => {
    const choice = make('button', { ariaPressed: String(index - 1 === player.heard) }, labelOf(name), make('kbd', {}, String(index + 1)));
    choice.addEventListener('click', () => hear(index - 1));
    return choice;
  }));
  const part = parts()[player.heard];
  find('#bleed-label').hidden = !part || part.name === 'residual';
  stage.show(part ?? state.recording).catch((error) => fail(error, banner));
}

attempts.addEventListener('chosen', async () => {
  const whole = [state.recording];
  const isFirst = player.parts[0]?.id === whole[0].id;
  const changed = parts().length ? player.setParts(parts(), isFirst ? 0 : undefined) : player.setParts(whole, -1);
  showListening();
  await changed;
});

find('#bleed').addEventListener('input', (event) => {
  player.setBleed(event.target.value / 100);
  find('#bleed-value').textContent = `${event.target.value} %`;
});

// Playing

export const toggle = () => (player.paused ? player.play() : player.pause());
find('#play').addEventListener('click', toggle);
for (const event of ['play', 'pause', 'ended']) {
  player.addEventListener(event, () => {
    find('#play').classList.toggle('playing', !player.paused);
    find('#play').ariaLabel = player.paused ? 'Play' : 'Pause';
  });
}
player.addEventListener('timeupdate', () => (find('#clock').textContent = clock(player.currentTime)));

// Stretches

stage.addEventListener('marked', ({ detail }) => query.addSpan(detail.id, detail.side, detail.start, detail.end));
stage.addEventListener('moved', ({ detail }) => query.move(detail.id, detail.start, detail.end));
stage.addEventListener('picked', ({ detail }) => find(`#item-${detail.id}`)?.scrollIntoView({ block: 'nearest' }));
query.addEventListener('changed', ({ detail }) => detail.kind === 'span' && stage.mark(detail));
query.addEventListener('removed', ({ detail }) => detail.kind === 'span' && stage.unmark(detail.id));

export function brush(side) {
  stage.setBrush(side);
  for (const each of ['keep', 'leave']) find(`#brush-${each}`).ariaPressed = String(each === side);
}
find('#brush-keep').addEventListener('click', () => brush('keep'));
find('#brush-leave').addEventListener('click', () => brush('leave'));

// K and L: the first press begins a stretch at the cursor, the second one ends it.
export function mark(side) {
  const now = player.currentTime;
  if (pending?.side !== side) {
    pending = { side, start: now };
    say(`${side} from ${clock(now)}; press again where it ends`);
    find('#stage').dataset.pending = side;
    return;
  }
  let [start, end] = [Math.min(pending.start, now), Math.max(pending.start, now)];
  if (end - start < 0.05) [start, end] = [Math.max(0, start - 0.5), Math.min(player.duration, start + 0.5)];
  dropMark();
  const id = crypto.randomUUID();
  query.addSpan(id, side, start, end);
  say(`${side} ${clock(start)} to ${clock(end)}`);
}

export function dropMark() {
  pending = null;
  delete find('#stage').dataset.pending;
}

// Extracting

find('#ask').addEventListener('submit', async (event) => {
  event.preventDefault();
  wrong('');
  try {
    take(await extract(query.wish({ model: find('#model').value, refine: JSON.parse(find('#refine').value) })));
    say('Extracting');
  } catch (error) {
    fail(error, wrong);
  }
});
attempts.addEventListener('state', ({ detail }) => take(detail));
for (const [source, tell] of [[attempts, wrong], [query, wrong], [player, banner], [stage, banner]]) {
  source.addEventListener('failed', ({ detail }) => fail(detail, tell));
}

// Opening

function mayLeave(name) {
  return !state?.attempts.length || confirm(`Open ${name}? What was extracted of ${state.recording.name} will be removed.`);
}

find('#track').addEventListener('change', async ({ target }) => {
  const { track } = state.recording;
  const wanted = Number(target.value);
  target.value = track;
  if (!mayLeave(`track ${wanted}`)) return;
  try {
    player.pause();
    take(await chooseTrack(wanted));
  } catch (error) {
    fail(error, banner);
  }
});

async function open(file) {
  if (!mayLeave(file.name)) return;
  banner('');
  find('#empty').classList.add('taking');
  find('#name').textContent = `Opening ${file.name}…`;
  try {
    player.pause();
    take(await openRecording(file));
  } catch (error) {
    find('#name').textContent = state?.recording?.name ?? '';
    fail(error, banner);
  } finally {
    find('#empty').classList.remove('taking');
  }
}

for (const input of [find('#open'), find('#open-first')]) {
  input.addEventListener('change', () => {
    if (input.files.length) open(input.files[0]);
    input.value = '';
  });
}

addEventListener('dragover', (event) => {
  if (!event.dataTransfer.types.includes('Files')) return;
  event.preventDefault();
  const over = event.target.closest?.('.side, #empty, #stage');
  for (const each of document.querySelectorAll('.dropping')) each.classList.toggle('dropping', each === over);
  over?.classList.add('dropping');
});
for (const event of ['dragleave', 'drop']) {
  addEventListener(event, () => document.querySelectorAll('.dropping').forEach((each) => each.classList.remove('dropping')));
}
addEventListener('drop', (event) => {
  const files = [...event.dataTransfer.files];
  if (!files.length) return;
  event.preventDefault();
  const side = event.target.closest?.('.side')?.dataset.side;
  if (side && state.recording) query.addFiles(files, side);
  else open(files[0]);
});

// What the mouse was used on does not keep the space bar from playing.
addEventListener('click', (event) => {
  const pressed = event.target.closest?.('button, input[type=range], input[type=checkbox]');
  if (pressed && event.detail > 0) pressed.blur();
});
find('#help-open').addEventListener('click', () => find('#help').showModal());
find('#zoom-in').addEventListener('click', () => stage.zoom(2));
find('#zoom-out').addEventListener('click', () => stage.zoom(0.5));
find('#zoom-fit').addEventListener('click', () => stage.fit());
listenToKeys({ attempts, brush, dropMark, hear, mark, player, stage, toggle });

history.replaceState(null, '', '/'); // the key is in the cookie now
await refresh();

// The keyboard. Keys that somebody types with, or that belong to what has the focus, are left alone.

const TYPING = 'input[type=text], textarea, select';
const PRESSING = 'button, a, summary, label';

export function listenToKeys({ attempts, dropMark, hear, mark, player, stage, toggle }) {
  const acts = {
    ' ': toggle,
    ArrowLeft: (event) => (player.currentTime -= event.shiftKey ? 10 : 1),
    ArrowRight: (event) => (player.currentTime += event.shiftKey ? 10 : 1),
    Home: () => (player.currentTime = 0),
    End: () => (player.currentTime = player.duration),
    k: () => mark('keep'),
    l: () => mark('leave'),
    b: () => attempts.swap(),
    Escape: dropMark,
    '+': () => stage.zoom(2),
    '=': () => stage.zoom(2),
    '-': () => stage.zoom(0.5),
    0: () => stage.fit(),
    '?': () => document.querySelector('#help').showModal(),
  };
  addEventListener('keydown', (event) => {
    const { key, target } = event;
    if (document.querySelector('#work').hidden || document.querySelector('dialog[open]')) return;
    if ((event.ctrlKey || event.metaKey) && key === 'Enter') {
      event.preventDefault(); // some browsers submit by themselves
      document.querySelector('#ask').requestSubmit();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest(TYPING)) return;
    if (key === ' ' && target.closest(PRESSING)) return;
    if (target.closest('input[type=range]') && /^(Arrow|Home|End)/.test(key)) return;
    const act = /^[1-9]$/.test(key) ? () => hear(Number(key) - 2) : acts[key.length === 1 ? key.toLowerCase() : key];
    if (!act) return;
    event.preventDefault();
    act(event);
  });
}

// Small helpers to make elements.

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A small button with a sign on it, and words for those who do not see it.
export function button(sign, label, act) {
  const made = make('button', { type: 'button', className: 'icon quiet', title: label, ariaLabel: label }, sign);
  made.addEventListener('click', act);
  return made;
}

export const find = (selector) => document.querySelector(selector);

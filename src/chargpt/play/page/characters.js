// Text in a box, a span for each character, which can be pointed at. Every index counts Unicode code points,
// as the server does: text is kept as Array.from(text), never indexed as a string.

import { make, span } from './tools.js';

export const STEPS = [0.5, 0.2, 0.1, 0.05, 0.02, 0.005];  // the probabilities at which the tint changes

export const tint = p => `p${STEPS.filter(step => p < step).length}`;  // p0 to p6 in play.css
export const glyph = char => ({ ' ': '␣', '\n': '↵', '\t': '⇥' })[char] ?? char;
export const spoken = char => ({ ' ': 'space', '\n': 'newline', '\t': 'tab' })[char] ?? char;
export const white = char => ({ ' ': 'sp', '\n': 'nl' })[char] ?? '';  // makes it visible, see play.css

export function letter(char, i, ...styles) {
  const element = span(['c', ...styles, white(char)].join(' ').trim(), char);
  element.dataset.i = i;
  return element;
}

export function legend(box, title, labels) {
  box.replaceChildren(span('quiet', title), ...labels.map((label, k) => span(`p${k}`, label)));
}

export function textBox(label, ...spans) {
  const box = make('div', {
    className: 'text', tabIndex: 0, role: 'textbox', 'aria-readonly': 'true', 'aria-multiline': 'true',
    'aria-label': `${label} The arrow keys move from character to character.`,
  }, ...spans);
  box.addEventListener('copy', event => {  // a line may be a block: the browser would write its newline twice
    const selection = getSelection();
    if (selection.isCollapsed) return;
    event.preventDefault();
    event.clipboardData.setData('text/plain', selection.getRangeAt(0).cloneContents().textContent);
  });
  return box;
}

export function readable(box, spans, current, show) {  // show(i, 'hover' | 'click' | 'key')
  const at = event => event.target.classList.contains('c') ? Number(event.target.dataset.i) : -1;
  box.addEventListener('pointerover', event => {
    if (event.pointerType !== 'touch' && at(event) >= 0) show(at(event), 'hover');
  });
  box.addEventListener('click', event => { if (at(event) >= 0) show(at(event), 'click'); });
  box.addEventListener('keydown', event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const to = move(spans(), current(), event.key);
    if (to < 0) return;
    event.preventDefault();
    show(to, 'key');
    reveal(box, spans()[to]);
  });
}

function move(spans, from, key) {  // the index to which a key moves, -1: no such key
  const last = spans.length - 1;
  if (last < 0 || !/^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(key)) return -1;
  if (key === 'End') return last;
  if (key === 'Home' || from < 0) return 0;
  if (key === 'ArrowLeft') return Math.max(0, from - 1);
  if (key === 'ArrowRight') return Math.min(last, from + 1);
  const step = key === 'ArrowUp' ? -1 : 1, x = spans[from].offsetLeft;
  const onLine = (i, top) => spans[i] && Math.abs(spans[i].offsetTop - top) < 4;  // a line of the screen
  let best = from;
  while (onLine(best, spans[from].offsetTop)) best += step;
  if (!spans[best]) return from;
  for (let i = best, top = spans[best].offsetTop; onLine(i, top); i += step) {
    if (Math.abs(spans[i].offsetLeft - x) < Math.abs(spans[best].offsetLeft - x)) best = i;
  }
  return best;
}

export function reveal(box, span) {  // scrolls the box, never the page
  const inner = span.getBoundingClientRect(), outer = box.getBoundingClientRect(), margin = 8;
  box.scrollTop += Math.min(0, inner.top - outer.top - margin)
    || Math.max(0, inner.bottom - outer.bottom + margin);
}

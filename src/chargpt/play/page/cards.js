// A card for each model: its text, with the colour of every character, and how fast it was written.

import { letter, readable, textBox, tint } from './characters.js';
import { inspect, point, spot } from './inspector.js';
import { $, count, key, make, span } from './tools.js';

export const cards = new Map();  // id of a model -> its card

export function addCard(model) {
  const text = textBox(`Text of ${model.name}.`);
  const use = make('button', {
    type: 'button', className: 'small', textContent: 'Use as prompt', disabled: true,
  });
  const facts = make('p', { className: 'quiet', textContent: `${count(model.parameters)} parameters` });
  const card = {
    model, text, use,
    status: span('status', 'ready'),
    rate: make('p', { className: 'rate', textContent: '–' }),
    problem: make('p', { className: 'problem', role: 'alert' }),
    spans: [], chars: [], reads: [],  // of every character
    starts: [],                       // of every character: where the context begins that predicted it
    line: null,                       // the block that characters are appended to
    follow: true,                     // keep the end of the text in sight
  };
  use.onclick = () => {
    $('prompt').value = card.chars.join('');
    $('prompt').focus();
  };
  card.element = make('article', { className: 'card', 'data-model': model.id, 'aria-label': model.name },
    make('h2', { title: model.run }, key(), span('name', model.name), card.status),
    text, card.problem, make('div', { className: 'foot' }, card.rate, facts, use));
  text.onscroll = () => { card.follow = text.scrollHeight - text.scrollTop - text.clientHeight < 30; };
  const current = () => spot?.card === card ? spot.i : -1;
  readable(text, () => card.spans, current, (i, how) => point(card, i, how));
  cards.set(model.id, card);
}

export function setStatus(card, words, state = 'idle') {
  card.status.textContent = words;
  card.element.dataset.state = state;
}

export function resetCard(card, prompt) {
  Object.assign(card, { spans: [], chars: [], reads: [], starts: [], line: null, follow: true });
  card.text.replaceChildren();
  card.use.disabled = false;
  card.problem.textContent = '';
  card.rate.textContent = '–';
  append(card, prompt, 'prompt');
  setStatus(card, 'reading the prompt', 'busy');
}

export function append(card, text, ...styles) {
  for (const char of text) {
    const element = letter(char, card.spans.length, ...styles);
    if (!card.line) card.text.append(card.line = make('div'));  // only the last block is laid out anew
    card.line.append(element);
    if (char === '\n') card.line = null;
    card.spans.push(element);
    card.chars.push(char);
  }
}

export function remember(card, from, reads, start) {  // what the model said of the characters from there on
  for (const [k, read] of reads.entries()) {
    const i = from + k;
    card.reads[i] = read;
    card.starts[i] = Math.max(start, i - card.model.context);
    if (read) card.spans[i].classList.add(tint(read.p));
  }
}

export function refresh(card) {  // once for each frame, after all writing: one layout
  const held = spot?.card === card && spot.pinned || card.text.matches(':hover');  // somebody points at it
  if (card.follow && !held) card.text.scrollTop = card.text.scrollHeight;
  if (spot?.card === card && spot.blank) inspect();
}

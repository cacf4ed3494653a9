// The inspector: one character of a card. How likely the model found it, what else it might have written,
// and what it read to decide.

import { glyph, spoken, tint } from './characters.js';
import { biasScale, drawHeat, weightScale } from './heat.js';
import { $, count, keyed, make, percent, post, range, span } from './tools.js';

export let spot = null;  // the character that is shown: { card, i, pinned, blank: not known yet }
let write;               // write(spot, char): another character in its place

export function setUpInspector(writeInstead) {
  write = writeInstead;
  $('unpin').onclick = clearSpot;
  $('modes').onchange = $('layer').onchange = $('head').onchange = showAttention;
}

export function point(card, i, how) {  // how: see `readable`
  if (how === 'hover' && spot?.pinned) return;
  setSpot(card, i, how !== 'hover');
  const read = card.reads[i];
  if (how === 'key') $('say').textContent = `${spoken(card.chars[i])}${read ? `, ${percent(read.p)}` : ''}`;
  if (how !== 'hover' && getComputedStyle($('inspector')).position === 'fixed') {  // it covers the lower half
    scrollBy(0, Math.max(0, card.spans[i].getBoundingClientRect().bottom - 0.44 * innerHeight));
  }
}

export function setSpot(card, i, pinned) {
  unmark();
  spot = { card, i, pinned };
  card.spans[i].classList.add(pinned ? 'pinned' : 'at');
  inspect();
}

export function clearSpot() {
  unmark();
  spot = null;
  inspect();
}

function unmark() {
  spot?.card.spans[spot.i].classList.remove('at', 'pinned');
}

export function inspect() {
  $('hint').hidden = Boolean(spot);
  $('detail').hidden = !spot;
  document.body.classList.toggle('looking', Boolean(spot));
  if (!spot) return;
  const { card, i, pinned } = spot, { model } = card, read = card.reads[i], char = card.chars[i];
  spot.blank = !read;
  keyed($('inspector'), model);
  $('where').textContent = `${model.name}, character ${count(i + 1)}`;
  $('unpin').textContent = pinned ? 'Unpin' : 'Close';
  $('glyph').textContent = glyph(char);
  $('glyph').className = `glyph ${read ? tint(read.p) : ''}`;
  $('glyph').setAttribute('aria-label', spoken(char));
  $('numbers').hidden = $('alternatives').hidden = !read;
  $('note').textContent = read ? '' : whyNothing(card, i);
  $('attention').hidden = !read || !model.has_weights;
  $('attention-note').textContent = read && !model.has_weights
    ? `${model.type} attention has no weights to show.` : '';
  if (!read) return;
  $('probability').textContent = percent(read.p);
  $('nats').textContent = `${(-Math.log(read.p)).toFixed(2)} nats`;
  showAlternatives(read.top, char);
  if (model.has_weights) askAttention(card, i);
}

function whyNothing(card, i) {
  if (i === 0) return 'Nothing came before the first character: the model had nothing to predict it from.';
  if (card.spans[i].classList.contains('unseen')) {
    return `The model did not see this character: it reads the last ${card.model.context} only.`;
  }
  if (i in card.reads) return 'The first character that the model saw: it had nothing to predict it from.';
  return 'The model has not read this character yet.';
}

function showAlternatives(top, written) {
  const list = $('alternatives').querySelector('ol');
  while (list.children.length < top.length) list.append(newAlternative());  // kept: so is the focus
  for (const [k, row] of [...list.children].entries()) {
    row.hidden = k >= top.length;
    if (row.hidden) continue;
    const [char, p] = top[k], button = row.firstChild, [name, track, number] = button.children;
    name.textContent = glyph(char);
    name.setAttribute('aria-label', spoken(char));
    track.firstChild.style.width = `${100 * p}%`;
    number.textContent = percent(p);
    button.classList.toggle('written', char === written);
    button.onclick = () => write(spot, char);
  }
}

function newAlternative() {
  const track = make('span', { className: 'track' }, make('i'));
  return make('li', {}, make('button', { type: 'button', title: 'Write this instead' },
    make('b'), track, span('number'), span('unseen-label', ', write this instead')));
}

// ---- what it read

const answers = new Map();  // by what was asked; the most recent last
let asked = { key: '', timer: 0, controller: null };
let shown = null;           // { key, chars, weights, bias } as drawn

function askAttention(card, i) {
  const { model } = card, chars = card.chars.slice(card.starts[i], i), text = chars.join('');
  const key = `${model.id}\n${text}`;
  if (asked.key === key && shown?.key === key) return;
  clearTimeout(asked.timer);
  asked.controller?.abort();
  const { signal } = (asked = { key, controller: new AbortController() }).controller;
  const known = answers.get(key);
  $('attention').classList.toggle('stale', !known);
  if (known) return gotAttention(key, chars, known);
  asked.timer = setTimeout(async () => {  // not for every character that the pointer passes
    try {
      const answer = await (await post('attention', { model: model.id, text }, signal)).json();
      if (!signal.aborted) gotAttention(key, chars, answer);
    } catch (error) {
      if (signal.aborted) return;
      $('attention').hidden = true;
      $('attention-note').textContent = error.message;
    }
  }, 120);
}

function gotAttention(key, chars, answer) {
  answers.delete(key);
  answers.set(key, answer);
  if (answers.size > 50) answers.delete(answers.keys().next().value);
  shown = { key, chars, ...answer };
  setUpPicker('layer', shown.weights.length);
  setUpPicker('head', shown.weights[0].length);
  $('attention').classList.remove('stale');
  showAttention();
}

function setUpPicker(id, n) {
  if ($(id).length === n) return;
  const old = Math.min($(id).value || n - 1, n - 1);
  $(id).replaceChildren(...range(n).map(k => make('option', { value: k, textContent: k })));
  $(id).value = old;
}

export function showAttention() {
  if (!shown) return;
  const mode = document.querySelector('#modes :checked').value;
  const view = { chars: shown.chars, mode, layer: $('layer').value, head: $('head').value };
  $('layer-label').hidden = mode === 'all';
  $('head-label').hidden = mode !== 'head';
  $('bias').hidden = !shown.bias;
  drawHeat($('weights'), shown.weights, view, weightScale);
  if (shown.bias) drawHeat($('bias'), shown.bias, view, biasScale);
}

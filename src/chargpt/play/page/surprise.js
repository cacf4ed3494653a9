// Comparing by surprise: how many nats each model pays for each character of a text.

import { STEPS, glyph, legend, letter, readable, reveal, spoken, textBox, tint } from './characters.js';
import { drawChart, moveRuler } from './chart.js';
import { choose, models } from './models.js';
import { $, count, key, keyed, make, post, range, span } from './tools.js';

let latest = null;  // the controller of the latest question
let sheets = [];    // of each model: { element, spans, text }
let lit = -1;       // the character that is marked in every text

export function setUpSurprise() {
  $('compare').onclick = compare;
  legend($('surprise-legend'), 'nats, at most', [...STEPS.map(p => (-Math.log(p)).toFixed(1)), 'more']);
}

export async function compare() {
  const ids = choose($('surprise-alert')), text = $('surprise-text').value;
  if (!ids.length) return;
  latest?.abort();
  const mine = latest = new AbortController();
  $('surprise-status').textContent = 'Reading…';
  try {
    const answer = await (await post('surprise', { models: ids, text }, mine.signal)).json();
    if (latest === mine) show(Array.from(text), answer.models);
  } catch (error) {
    if (latest === mine) $('surprise-alert').textContent = error.message;
  }
  if (latest === mine) $('surprise-status').textContent = '';
}

function show(chars, answers) {
  const named = answers.map(answer => ({ ...answer, model: models.get(answer.model) }));
  const good = named.filter(answer => !answer.error), bad = named.filter(answer => answer.error);
  $('surprise-alert').textContent = bad.map(({ model, error }) => `${model.name}: ${error}`).join(' ');
  $('result').hidden = false;
  $('differences').hidden = $('figure').hidden = good.length < 2;
  $('sums').replaceChildren(...newSums(good));
  sheets = good.map(answer => newSheet(chars, answer, good));
  $('sheets').replaceChildren(...sheets.map(sheet => sheet.element));
  drawChart(chars.length, good);
  light(-1, chars, good);
  $('places').replaceChildren(...places(chars, good).map(i => make('li', {}, newPlace(i, chars, good))));
  $('say').textContent = 'Compared.';
}

function newSums(good) {
  const best = Math.min(...good.map(answer => answer.mean));
  return good.map(({ model, sum, mean }) => {
    const words = good.length < 2 ? '' : mean === best ? 'best' : `+${(mean - best).toFixed(3)}`;
    const row = make('tr', { className: mean === best ? 'best' : '' },
      make('th', { scope: 'row' }, key(), model.name),
      ...[sum.toFixed(1), mean.toFixed(3), words].map(cell => make('td', { textContent: cell })));
    keyed(row, model);
    return row;
  });
}

function newSheet(chars, { model, nats }, good) {
  const shades = nats.map(value => value === null ? 'unseen' : tint(Math.exp(-value)));
  const spans = chars.map((char, i) => letter(char, i, shades[i]));
  const text = textBox(`The text as ${model.name} reads it.`, ...spans);
  const element = make('article', { className: 'sheet', 'data-model': model.id },
    make('h2', {}, key(), span('name', model.name)), text);
  keyed(element, model);
  readable(text, () => spans, () => lit, (i, how) => {
    light(i, chars, good);
    if (how === 'key') $('say').textContent = `${spoken(chars[i])}, ${nats[i]?.toFixed(2) ?? 'no'} nats`;
  });
  return { element, spans, text };
}

function light(i, chars, good) {
  for (const { spans } of sheets) {
    spans[lit]?.classList.remove('at');
    spans[i]?.classList.add('at');
  }
  lit = i;
  moveRuler(i);
  const nothing = i < 0 || good[0].nats[i] === null;
  $('pointed').replaceChildren(...nothing
    ? ['Point at a place, or at any character of a text, to see it in every text.']
    : [`${glyph(chars[i])} character ${count(i + 1)}, nats: `, values(i, good)]);
}

function values(i, good) {
  return make('span', { className: 'values' }, ...good.map(({ model, nats }) => {
    const value = make('span', { title: model.name }, key(), span('unseen-label', `${model.name} `),
      nats[i].toFixed(nats[i] < 10 ? 2 : 1));
    keyed(value, model);
    return value;
  }));
}

function places(chars, good) {  // where they differ most
  const spread = i => {
    const all = good.map(({ nats }) => nats[i]);
    return Math.max(...all) - Math.min(...all);
  };
  const scored = range(chars.length).filter(i => good[0].nats[i] !== null);
  return scored.sort((a, b) => spread(b) - spread(a)).slice(0, 8);
}

function newPlace(i, chars, good) {
  const sorted = [...good].sort((a, b) => a.nats[i] - b.nats[i]);
  const before = chars.slice(Math.max(0, i - 18), i).map(char => char === ' ' ? char : glyph(char)).join('');
  const place = make('span', { className: 'place' }, before, make('mark', { textContent: glyph(chars[i]) }));
  const words = span('quiet', `${sorted[0].model.name} least, ${sorted.at(-1).model.name} most`);
  const button = make('button', { type: 'button' }, place, words, values(i, good));
  button.onpointerenter = button.onfocus = button.onclick = () => {
    light(i, chars, good);
    for (const { spans, text } of sheets) reveal(text, spans[i]);
  };
  return button;
}

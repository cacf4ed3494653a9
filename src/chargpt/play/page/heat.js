// How strongly a model reads each character before the one it predicts: on the text itself for one head or
// the mean of a layer, as a row of cells for each head otherwise.

import { glyph, white } from './characters.js';
import { make, percent, range, signed, span } from './tools.js';

// A scale: how strong (0 to 1) and in which colour a value is painted, how it is written, and its legend.
// A value is null where nothing is read.
const WEIGHT = {
  strength: Math.sqrt, colour: () => '--read', words: percent,
  name: 'share of its attention', ramp: 'ramp-read', ticks: [0, 0.04, 0.25, 1], place: Math.sqrt,
};

export const weightScale = () => WEIGHT;

export function biasScale(values) {
  const most = Math.max(0.01, ...values.map(Math.abs));
  return {
    strength: b => Math.abs(b) / most, colour: b => b < 0 ? '--minus' : '--plus',
    words: b => b === null ? 'out of sight' : signed(b),
    name: 'nats added to the score', ramp: 'ramp-bias', ticks: [-most, 0, most],
    place: b => (b / most + 1) / 2,
  };
}

// tensor[layer][head][character]; view: { chars, mode: 'head' | 'layer' | 'all', layer, head };
// scaleOf(values): the scale for those that are shown
export function drawHeat(box, tensor, { chars, mode, layer, head }, scaleOf) {
  const row = mode === 'head' ? tensor[layer][head] : mode === 'layer' ? mean(tensor[layer]) : null;
  const scale = scaleOf(row ?? tensor.flat(2));
  const usual = row ? strongest(chars, row, scale) : 'Point at a cell to read it.';
  const caption = make('p', { className: 'caption', textContent: usual });
  const say = (j, value, prefix = '') => {
    caption.textContent = `${prefix}${glyph(chars[j])} ${chars.length - j} back: ${scale.words(value)}`;
  };
  const quiet = () => { caption.textContent = usual; };
  const picture = row ? strip(chars, row, scale, say) : rows(chars, tensor, scale, say, quiet);
  picture.addEventListener('pointerleave', quiet);
  box.replaceChildren(...box.querySelectorAll('h3'), picture, caption, scaleLegend(scale));
}

function mean(rows) {
  const at = j => rows.reduce((sum, row) => sum + row[j], 0) / rows.length;
  return rows[0].map((value, j) => value === null ? null : at(j));
}

function strongest(chars, row, scale) {
  const seen = range(row.length).filter(j => row[j] !== null);
  const order = seen.sort((a, b) => Math.abs(row[b]) - Math.abs(row[a])).slice(0, 3);
  return `Strongest: ${order.map(j => `${glyph(chars[j])} ${scale.words(row[j])}`).join(' · ')}`;
}

function strip(chars, row, scale, say) {
  const spans = chars.map((char, j) => {
    const element = span(`w ${white(char)}`.trim(), char);
    element.style.setProperty('--strength', `${100 * scale.strength(row[j])}%`);
    element.style.setProperty('--hue', `var(${scale.colour(row[j])})`);
    element.onpointerenter = () => say(j, row[j]);
    return element;
  });
  return make('div', { className: 'strip' }, ...spans);
}

const CELL = 9, ROW = 12;  // pixels of a cell

function rows(chars, tensor, scale, say, quiet) {
  const flat = tensor.flat(), heads = tensor[0].length;
  const label = k => `L${Math.floor(k / heads)} H${k % heads}`;
  const canvas = make('canvas', { role: 'img', 'aria-label': 'Rows: heads. Columns: characters.' });
  paint(canvas, chars, flat, scale);
  canvas.onpointermove = event => {
    const j = Math.floor(event.offsetX / CELL), k = Math.floor(event.offsetY / ROW - 1.5);
    if (flat[k]?.[j] === undefined) quiet(); else say(j, flat[k][j], `${label(k)}: `);
  };
  const named = { tabIndex: 0, role: 'group', 'aria-label': 'All heads' };
  const scroller = make('div', { className: 'scroller', ...named }, canvas);
  requestAnimationFrame(() => { scroller.scrollLeft = scroller.scrollWidth; });  // the nearest are at the end
  const labels = make('div', { className: 'labels' }, ...flat.map((_, k) => span('', label(k))));
  return make('div', { className: 'rows' }, labels, scroller);
}

function paint(canvas, chars, flat, scale) {
  const wide = CELL * chars.length, tall = ROW * (flat.length + 1.5);
  const styles = getComputedStyle(document.body);
  Object.assign(canvas, { width: wide * devicePixelRatio, height: tall * devicePixelRatio });
  Object.assign(canvas.style, { width: `${wide}px`, height: `${tall}px` });
  const pen = canvas.getContext('2d');
  pen.scale(devicePixelRatio, devicePixelRatio);
  pen.font = `11px ${styles.getPropertyValue('--mono')}`;
  pen.textAlign = 'center';
  pen.fillStyle = styles.getPropertyValue('--ink');
  for (const [j, char] of chars.entries()) pen.fillText(glyph(char), (j + 0.5) * CELL, ROW);
  for (const [k, row] of flat.entries()) {
    for (const [j, value] of row.entries()) {
      pen.globalAlpha = scale.strength(value);
      pen.fillStyle = styles.getPropertyValue(scale.colour(value));
      pen.fillRect(j * CELL, (k + 1.5) * ROW, CELL - 1, ROW - 1);
    }
  }
}

function scaleLegend(scale) {
  const ticks = scale.ticks.map(value => {
    const tick = span('', scale === WEIGHT ? `${100 * value}%` : scale.words(value));
    tick.style.left = `${100 * scale.place(value)}%`;
    return tick;
  });
  const ramp = make('div', { className: `ramp ${scale.ramp}` });
  return make('div', { className: 'scale' }, span('quiet', scale.name),
    make('div', {}, ramp, make('div', { className: 'ticks quiet' }, ...ticks)));
}

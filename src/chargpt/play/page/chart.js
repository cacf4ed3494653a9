// The running sum of what each model pays more (up) or less (down) than the first.

import { $, count, range, signed } from './tools.js';

const TALL = 190, LEFT = 40, TOP = 12, BOTTOM = TALL - 22;
let ruler = null, step = 0;  // step: from character to character

function svg(tag, attributes, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function drawChart(length, good) {  // good: of each model { model, nats }
  const [first] = good, wide = $('chart').clientWidth || 520, right = wide - 96;
  const lines = good.map(({ nats }) => {
    let sum = 0;
    return nats.map((value, i) => sum += (value ?? 0) - (first.nats[i] ?? 0));
  });
  const low = Math.min(...lines.flat()), high = Math.max(...lines.flat(), low + 0.1);
  step = (right - LEFT) / Math.max(1, length - 1);
  const x = i => (LEFT + i * step).toFixed(1);
  const y = v => Math.round(10 * (BOTTOM - (v - low) / (high - low) * (BOTTOM - TOP))) / 10;
  const ends = apart(lines.map(line => y(line.at(-1))), BOTTOM + 8);
  ruler = svg('line', { class: 'ruler', y1: TOP, y2: BOTTOM });
  $('chart-caption').textContent = `Nats paid so far, minus those of ${first.model.name}: falling is better`;
  const size = { width: wide, height: TALL, viewBox: `0 0 ${wide} ${TALL}` };
  const frame = { ...size, role: 'img', 'aria-labelledby': 'chart-caption' };
  $('chart').replaceChildren(svg('svg', frame,
    ...round(low, high).flatMap(v => [
      svg('line', { class: v === 0 ? 'zero' : '', x1: LEFT, x2: right, y1: y(v), y2: y(v) }),
      svg('text', { x: LEFT - 6, y: y(v) + 4, 'text-anchor': 'end' }, signed(v))]),
    svg('text', { x: LEFT, y: TALL - 4 }, '1'),
    svg('text', { x: right, y: TALL - 4, 'text-anchor': 'end' }, `character ${count(length)}`),
    ruler,
    ...good.flatMap(({ model }, k) => {
      const points = lines[k].map((v, i) => `${x(i)},${y(v)}`).join(' ');
      const end = { x1: right, y1: y(lines[k].at(-1)), x2: right + 10, y2: ends[k] };
      const line = svg('polyline', { class: 'arm', points }), lead = svg('line', { class: 'arm', ...end });
      line.style.stroke = lead.style.stroke = `var(--arm${model.arm})`;
      return [line, lead, svg('text', { x: right + 14, y: ends[k] + 4 }, model.name.slice(0, 14))];
    })));
}

export function moveRuler(i) {  // -1: nowhere
  ruler.classList.toggle('on', i >= 0);
  ruler.setAttribute('transform', `translate(${LEFT + i * step} 0)`);
}

function round(low, high) {  // the round numbers in between, about five of them
  const unit = 10 ** Math.floor(Math.log10(high - low));
  const gap = unit * ([0.2, 0.5, 1, 2].find(k => (high - low) / (k * unit) <= 5) ?? 5);
  const from = Math.ceil(low / gap);
  return range(Math.floor(high / gap) - from + 1).map(k => (from + k) * gap);
}

function apart(heights, most) {  // moves labels until none covers another
  const order = range(heights.length).sort((a, b) => heights[a] - heights[b]), gap = 13, moved = [...heights];
  order.forEach((k, n) => { if (n) moved[k] = Math.max(moved[k], moved[order[n - 1]] + gap); });
  const over = Math.max(0, moved[order.at(-1)] - most);
  return moved.map(height => height - over);
}

'use strict';
// The page of `chargpt play`. Text from the server or the user only ever becomes text nodes, and every index counts
// Unicode code points, as the server does: text is kept as Array.from(text), never indexed as a string.

const GONE = 'The server does not answer. Is “chargpt play” still running? Start it again, then try once more.';
const CUT = 'The server went away before the text was finished. Start “chargpt play” again, then press Continue.';
const LINES = 'To be, or not to be, that is the question:\nWhether \'tis nobler in the mind to suffer\n'
  + 'The slings and arrows of outrageous fortune,';
const STEPS = [0.5, 0.2, 0.1, 0.05, 0.02, 0.005];  // the probabilities at which the tint of a character changes
const ARMS = 7;                                    // colours in play.css

const models = new Map();   // id -> the model as the server describes it, and arm: the number of its colour
const cards = new Map();    // id -> its card, see newCard
let limits = { models: 6 };
let running = null;         // the stream being read: { controller, open: ids of models that have not ended }
let spot = null;            // the character in the inspector: { card, i, pinned }

// ---------------------------------------------------------------- small tools

const $ = id => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const range = n => Array.from({ length: n }, (_, i) => i);
const mean = rows => rows[0].map((_, j) => rows.reduce((sum, row) => sum + row[j], 0) / rows.length);
const count = n => n.toLocaleString('en');
const percent = p => p < 0.0001 ? '< 0.01%' : `${Number((100 * p).toPrecision(p < 0.1 ? 2 : 3))}%`;
const signed = v => Number(v.toFixed(2)).toLocaleString('en', { signDisplay: 'exceptZero' }).replace('-', '−');
const level = p => STEPS.filter(step => p < step).length;

const key = () => make('span', { className: 'key' });
const span = (className, textContent) => make('span', { className, textContent });

const glyph = char => ({ ' ': '␣', '\n': '↵', '\t': '⇥' })[char] ?? char;
const spoken = char => ({ ' ': 'space', '\n': 'newline', '\t': 'tab' })[char] ?? char;

function bytes(n) {
  const unit = n < 1024 ? 0 : n < 1024 ** 2 ? 1 : 2;
  return `${Number((n / 1024 ** unit).toFixed(1))} ${['B', 'KiB', 'MiB'][unit]}`;
}

function kind(char) {  // makes white space visible, see play.css
  return char === '\n' ? ' nl' : char === ' ' ? ' sp' : '';
}

// The colour of a model, for everything within the element
const keyed = (element, model) => element.style.setProperty('--key', `var(--arm${model.arm})`);

function storage(name) {  // may be forbidden altogether: then the page forgets, and works
  const guard = action => { try { return action(window[name]); } catch { return null; } };
  return {
    get: key => guard(store => store.getItem(key)),
    set: (key, value) => guard(store => store.setItem(key, value)),
  };
}

async function post(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    throw signal?.aborted ? error : new Error(GONE);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error ?? `The server answered ${response.status} without saying why.`);
}

async function* events(body) {  // server-sent events: [name, data]
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read().catch(() => { throw new Error(CUT); });
    if (done) return;
    const parts = (rest + value).replaceAll('\r\n', '\n').split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      const name = /^event: ?(.*)$/m.exec(part), data = /^data: ?(.*)$/m.exec(part);
      if (name && data) yield [name[1], JSON.parse(data[1])];
    }
  }
}

// ---------------------------------------------------------------- theme, tabs, and what survives a reload

const session = storage('sessionStorage'), local = storage('localStorage');
const FIELDS = ['prompt', 'temperature', 'top-k', 'top-p', 'seed', 'length', 'surprise-text'];
const system = matchMedia('(prefers-color-scheme: dark)');

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const dark = (theme ?? (system.matches ? 'dark' : 'light')) === 'dark';
  $('theme').textContent = dark ? 'Light' : 'Dark';
  $('theme').onclick = () => { setTheme(dark ? 'light' : 'dark'); local.set('theme', dark ? 'light' : 'dark'); };
  showAttention();  // a canvas keeps the colours that it was drawn with
}

function setTab(name) {
  for (const tab of document.querySelectorAll('[role=tab]')) {
    const on = tab.id === `tab-${name}`;
    tab.setAttribute('aria-selected', on);
    tab.tabIndex = on ? 0 : -1;
    $(tab.getAttribute('aria-controls')).hidden = !on;
  }
  document.body.dataset.tab = name;
  save();
}

function setUpTabs() {
  const tabs = [...document.querySelectorAll('[role=tab]')];
  for (const [at, tab] of tabs.entries()) {
    tab.onclick = () => setTab(tab.id.slice('tab-'.length));
    tab.onkeydown = event => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = tabs.at(to % tabs.length);
      next.click();
      next.focus();
    };
  }
}

function save() {
  if (!models.size) return;  // nothing has been restored yet
  session.set('play', JSON.stringify({
    fields: Object.fromEntries(FIELDS.map(id => [id, $(id).value])),
    chosen: chosen().map(id => models.get(id).run),  // ids may differ when the server has been started anew
    tab: document.body.dataset.tab,
    colour: $('colour').checked,
  }));
}

// ---------------------------------------------------------------- models

const boxes = () => [...document.querySelectorAll('#models input')];
const chosen = () => boxes().filter(box => box.checked).map(box => Number(box.dataset.model));

function addModel(model, on) {
  models.set(model.id, { ...model, arm: model.id % ARMS });
  const box = make('input', { type: 'checkbox', checked: on, 'data-model': model.id });
  const loss = model.loss === null ? '' : `${model.loss.toFixed(2)} nats`;
  $('models').append(make('label', { className: 'chip', title: model.run },
    box, key(), span('name', model.name), span('quiet', loss)));
  cards.set(model.id, newCard(models.get(model.id)));
}

function syncModels() {
  const ids = chosen(), full = ids.length >= limits.models, taken = new Set();
  for (const model of ids.map(id => models.get(id))) {  // no two chosen models share a colour
    if (taken.has(model.arm)) model.arm = range(ARMS).find(arm => !taken.has(arm)) ?? model.arm;
    taken.add(model.arm);
  }
  for (const box of boxes()) {
    box.disabled = full && !box.checked;
    keyed(box.parentElement, models.get(Number(box.dataset.model)));
  }
  $('models-note').textContent = models.size > limits.models ? `${limits.models} at most` : '';
  for (const card of cards.values()) keyed(card.element, card.model);
  $('cards').replaceChildren(...ids.map(id => cards.get(id).element));
  if (spot && !ids.includes(spot.card.model.id)) clearSpot();
}

// ---------------------------------------------------------------- cards

function newCard(model) {
  const text = textBox(`Text of ${model.name}.`);
  const use = make('button', { type: 'button', className: 'small', textContent: 'Use as prompt', disabled: true });
  const card = {
    model, text, use,
    status: span('status', 'ready'),
    rate: make('p', { className: 'rate', textContent: '–' }),
    problem: make('p', { className: 'problem', role: 'alert' }),
    spans: [], chars: [], reads: [],  // of every character
    starts: [],                       // of every character: where the context begins that it was predicted from
    follow: true,                     // keep the end of the text in sight
  };
  use.onclick = () => usePrompt(card.chars.join(''));
  const facts = `${count(model.parameters)} parameters`;
  card.element = make('article', { className: 'card', 'data-model': model.id, 'aria-label': model.name },
    make('h2', { title: model.run }, key(), span('name', model.name), card.status),
    text, card.problem,
    make('div', { className: 'foot' }, card.rate, make('p', { className: 'quiet', textContent: facts }), use));
  text.onscroll = () => { card.follow = text.scrollHeight - text.scrollTop - text.clientHeight < 30; };
  readable(text, () => card.spans, () => spot?.card === card ? spot.i : -1, (i, how) => point(card, i, how));
  return card;
}

function setStatus(card, words, state = 'idle') {
  card.status.textContent = words;
  card.element.dataset.state = state;
}

function resetCard(card, prompt) {
  Object.assign(card, { spans: [], chars: [], reads: [], starts: [], line: null, follow: true });
  card.text.replaceChildren();
  card.use.disabled = false;
  card.problem.textContent = '';
  card.rate.textContent = '–';
  append(card, prompt, ' prompt');
  setStatus(card, 'reading the prompt', 'busy');
}

function append(card, text, style = '') {
  for (const char of text) {
    const element = span(`c${style}${kind(char)}`, char);
    element.dataset.i = card.spans.length;
    if (!card.line) card.text.append(card.line = make('div'));  // a block each: only the last is laid out anew
    card.line.append(element);
    if (char === '\n') card.line = null;
    card.spans.push(element);
    card.chars.push(char);
  }
}

function remember(card, from, reads, start) {
  for (const [k, read] of reads.entries()) {
    const i = from + k;
    card.reads[i] = read;
    card.starts[i] = Math.max(start, i - card.model.context);
    if (read) card.spans[i].classList.add(`p${level(read.p)}`);
  }
}

function usePrompt(text) {
  $('prompt').value = text;
  $('prompt').focus();
  save();
}

// ---------------------------------------------------------------- reading the streams

const queue = [];  // events that wait for the next frame: a fast model sends more of them than a screen can show
let frame = 0;

function enqueue(event) {
  queue.push(event);
  frame ||= requestAnimationFrame(flush);
}

function flush() {
  cancelAnimationFrame(frame);
  frame = 0;
  const touched = new Set();
  for (const [name, data] of queue.splice(0)) {
    const card = cards.get(data.model);
    if (!card || !running?.open.has(data.model)) continue;
    on[name]?.(card, data);
    touched.add(card);
  }
  for (const card of touched) {  // after all writing: one layout for each frame
    const held = spot?.card === card && spot.pinned || card.text.matches(':hover');  // somebody points at it
    if (card.follow && !held) card.text.scrollTop = card.text.scrollHeight;
    if (spot?.card === card && spot.blank) inspect();
  }
  if (touched.size) sayProgress();
}

const on = {
  waiting(card) { setStatus(card, 'waiting for its turn', 'waiting'); },
  prompt(card, { start, read }) {
    for (const element of card.spans.slice(0, start)) element.classList.add('unseen');
    remember(card, start, read, start);
    setStatus(card, 'writing', 'busy');
  },
  text(card, { text, start, read, rate, cache_bytes: cache }) {
    const from = card.spans.length;
    append(card, text);
    remember(card, from, read, start);
    card.rate.textContent = `${count(Math.round(rate))} characters/s · cache ${bytes(cache)}`;
    setStatus(card, 'writing', 'busy');
  },
  end(card, { reason }) {
    setStatus(card, reason === 'stopping' ? 'ended: the server is stopping' : 'done');
    running.open.delete(card.model.id);
  },
  error(card, { error }) {
    card.problem.textContent = error;
    setStatus(card, 'failed', 'failed');
    running.open.delete(card.model.id);
  },
};

function sayProgress() {
  const left = running?.open.size;
  $('status').textContent = left ? `${left === 1 ? 'One model is' : `${left} models are`} writing` : 'Finished';
}

function settings() {
  const number = id => $(id).value === '' ? null : Number($(id).value);
  return {
    length: number('length'), temperature: number('temperature'), seed: number('seed'),
    top_k: number('top-k'), top_p: number('top-p'),
  };
}

function finish(words, status) {  // ends the present stream, whatever is left of it
  flush();
  for (const id of running.open) setStatus(cards.get(id), words);
  running.controller.abort();
  running = null;
  $('status').textContent = status;
  if (document.activeElement === $('stop')) $('continue').focus();  // a disabled button drops the focus
  $('stop').disabled = true;
}

function stop() {
  if (running) finish('stopped', 'Stopped');
}

async function run(keep = null) {  // keep: a spot to go on looking at
  stop();
  save();
  const prompt = $('prompt').value, ids = chosen();
  $('alert').textContent = ids.length ? '' : 'No model is chosen: tick at least one.';
  if (!ids.length) return;
  const mine = running = { controller: new AbortController(), open: new Set() };
  $('stop').disabled = false;
  $('status').textContent = 'Asking the server';
  try {
    const response = await post('continue', { models: ids, prompt, ...settings() }, mine.controller.signal);
    if (running !== mine) return;
    clearSpot();
    mine.open = new Set(ids);
    for (const id of ids) resetCard(cards.get(id), prompt);
    if (keep) lookAgain(keep);
    for await (const event of events(response.body)) {
      if (running !== mine) return;  // stopped, or a later one took its place
      enqueue(event);
    }
    flush();
    if (mine.open.size) throw new Error(CUT);
    finish('', 'Finished');
  } catch (error) {
    if (running !== mine) return;
    $('alert').textContent = error.message;
    finish('cut off', mine.open.size ? 'Not finished' : '');
  }
}

function lookAgain({ card, i }) {
  setSpot(card, i, true);
  card.text.focus({ preventScroll: true });
  reveal(card.text, card.spans[i]);
}

function again() {
  $('seed').value = Number($('seed').value) + 1;
  run();
}

// ---------------------------------------------------------------- pointing at characters

function textBox(label, ...spans) {
  const box = make('div', {
    className: 'text', tabIndex: 0, role: 'textbox', 'aria-readonly': 'true', 'aria-multiline': 'true',
    'aria-label': `${label} The arrow keys move from character to character.`,
  }, ...spans);
  box.addEventListener('copy', event => {  // the browser would write every newline twice, see append
    event.preventDefault();
    event.clipboardData.setData('text/plain', getSelection().getRangeAt(0).cloneContents().textContent);
  });
  return box;
}

function readable(box, spans, current, show) {  // show(i, 'hover' | 'click' | 'key')
  const at = event => event.target.classList.contains('c') ? Number(event.target.dataset.i) : -1;
  box.addEventListener('pointerover', event => {
    if (event.pointerType !== 'touch' && at(event) >= 0) show(at(event), 'hover');
  });
  box.addEventListener('click', event => { if (at(event) >= 0) show(at(event), 'click'); });
  box.addEventListener('keydown', event => {
    const to = event.ctrlKey || event.altKey || event.metaKey ? -1 : move(spans(), current(), event.key);
    if (to < 0) return;
    event.preventDefault();
    show(to, 'key');
    reveal(box, spans()[to]);
  });
}

function move(spans, from, key) {  // the index to which a key moves, -1: no such key
  const last = spans.length - 1;
  if (last < 0 || !/^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(key)) return -1;
  if (key === 'Home' || from < 0) return 0;
  if (key === 'End') return last;
  if (key === 'ArrowLeft') return Math.max(0, from - 1);
  if (key === 'ArrowRight') return Math.min(last, from + 1);
  const step = key === 'ArrowUp' ? -1 : 1, x = spans[from].offsetLeft;
  const near = (i, top) => spans[i] && Math.abs(spans[i].offsetTop - top) < 4;  // on that line of the screen
  let best = from;
  while (near(best, spans[from].offsetTop)) best += step;
  if (!spans[best]) return from;
  for (let i = best, top = spans[best].offsetTop; near(i, top); i += step) {
    if (Math.abs(spans[i].offsetLeft - x) < Math.abs(spans[best].offsetLeft - x)) best = i;
  }
  return best;
}

function reveal(box, span) {  // scrolls the box, never the page
  const inner = span.getBoundingClientRect(), outer = box.getBoundingClientRect(), margin = 8;
  box.scrollTop += Math.min(0, inner.top - outer.top - margin) || Math.max(0, inner.bottom - outer.bottom + margin);
}

function point(card, i, how) {
  if (how === 'hover' && spot?.pinned) return;
  setSpot(card, i, how !== 'hover');
  const read = card.reads[i];
  if (how === 'key') $('say').textContent = `${spoken(card.chars[i])}${read ? `, ${percent(read.p)}` : ''}`;
  if (how !== 'hover' && getComputedStyle($('inspector')).position === 'fixed') {  // a sheet covers the lower half
    scrollBy(0, Math.max(0, card.spans[i].getBoundingClientRect().bottom - 0.44 * innerHeight));
  }
}

function setSpot(card, i, pinned) {
  unmark();
  spot = { card, i, pinned };
  card.spans[i].classList.add(pinned ? 'pinned' : 'at');
  inspect();
}

function unmark() {
  spot?.card.spans[spot.i]?.classList.remove('at', 'pinned');
}

function clearSpot() {
  unmark();
  spot = null;
  inspect();
}

function escape(event) {  // unpins where one is looking, stops elsewhere
  const looking = spot?.pinned && document.activeElement.closest('.card, #inspector');
  if (running && !looking) stop(); else if (spot) clearSpot(); else return;
  event.preventDefault();
}

// ---------------------------------------------------------------- the inspector

function inspect() {
  $('hint').hidden = Boolean(spot);
  $('detail').hidden = !spot;
  document.body.classList.toggle('looking', Boolean(spot));
  if (!spot) return;
  const { card, i, pinned } = spot, read = card.reads[i], char = card.chars[i];
  keyed($('inspector'), card.model);
  $('where').textContent = `${card.model.name}, character ${count(i + 1)}`;
  $('unpin').textContent = pinned ? 'Unpin' : 'Close';
  $('glyph').textContent = glyph(char);
  $('glyph').className = `glyph ${read ? `p${level(read.p)}` : ''}`;
  $('glyph').setAttribute('aria-label', spoken(char));
  $('numbers').hidden = $('alternatives').hidden = !read;
  $('note').textContent = read ? '' : whyNothing(card, i);
  $('attention').hidden = !read || !card.model.has_weights;
  $('attention-note').textContent = read && !card.model.has_weights
    ? `${card.model.type} attention has no weights to show.` : '';
  spot.blank = !read;  // look again when the stream brings it
  if (!read) return;
  $('probability').textContent = percent(read.p);
  $('nats').textContent = `${(-Math.log(read.p)).toFixed(2)} nats`;
  showAlternatives(read.top, char);
  if (card.model.has_weights) askAttention(card, i);
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
  while (list.children.length < 5) {  // made once, so that the focus stays where it is
    const bar = make('span', { className: 'track' }, make('i'));
    const button = make('button', { type: 'button', title: 'Write this instead' },
      make('b'), bar, span('number', ''), span('unseen-label', ', write this instead'));
    list.append(make('li', {}, button));
  }
  for (const [k, row] of [...list.children].entries()) {
    row.hidden = k >= top.length;
    if (row.hidden) continue;
    const [char, p] = top[k], [name, track, number] = row.firstChild.children;
    name.textContent = glyph(char);
    name.setAttribute('aria-label', spoken(char));
    track.firstChild.style.width = `${100 * p}%`;
    number.textContent = percent(p);
    row.firstChild.classList.toggle('written', char === written);
    row.firstChild.onclick = () => writeInstead(char);
  }
}

function writeInstead(char) {
  const { card, i } = spot;
  $('prompt').value = card.chars.slice(0, i).join('') + char;
  run({ card, i });
}

// ---------------------------------------------------------------- attention

const answers = new Map();  // the most recent last
let asked = { key: '', timer: 0, controller: null };
let shown = null;           // { chars, weights, bias } as drawn

function askAttention(card, i) {
  const chars = card.chars.slice(card.starts[i], i), key = `${card.model.id}\n${chars.join('')}`;
  if (asked.key === key && shown?.key === key) return;
  clearTimeout(asked.timer);
  asked.controller?.abort();
  asked = { key, controller: new AbortController() };
  setUpPickers(card.model);
  const known = answers.get(key);
  $('attention').classList.toggle('stale', !known);
  if (known) return gotAttention(key, chars, known);
  const ask = async () => {
    const signal = asked.controller.signal;
    try {
      const answer = await (await post('attention', { model: card.model.id, text: chars.join('') }, signal)).json();
      if (asked.key === key) gotAttention(key, chars, answer);
    } catch (error) {
      if (signal.aborted) return;
      $('attention').hidden = true;
      $('attention-note').textContent = error.message;
    }
  };
  asked.timer = setTimeout(ask, 120);
}

function gotAttention(key, chars, answer) {
  if (!answer.weights) throw new Error('The server sent no weights for this character.');
  answers.delete(key);
  answers.set(key, answer);
  if (answers.size > 50) answers.delete(answers.keys().next().value);
  shown = { key, chars, ...answer };
  $('attention').classList.remove('stale');
  showAttention();
}

function setUpPickers({ layers, heads }) {
  for (const [id, n] of [['layer', layers], ['head', heads]]) {
    if ($(id).length === n) continue;
    const old = Math.min($(id).value || n - 1, n - 1);
    $(id).replaceChildren(...range(n).map(k => make('option', { value: k, textContent: k })));
    $(id).value = old;
  }
}

function showAttention() {
  if (!shown?.weights) return;
  const mode = document.querySelector('#modes :checked').value;
  $('layer-label').hidden = mode === 'all';
  $('head-label').hidden = mode !== 'head';
  $('bias').hidden = !shown.bias;
  drawHeat($('weights'), shown.weights, mode, WEIGHT);
  if (shown.bias) {
    const most = Math.max(0.01, ...shown.bias.flat(2).map(Math.abs));
    drawHeat($('bias'), shown.bias, mode, biasScale(most));
  }
}

// A scale: how strong (0 to 1) and in which colour a value is painted, how it is written, and its legend
const WEIGHT = {
  strength: Math.sqrt, colour: () => '--read', words: percent,
  name: 'share of its attention', ramp: 'ramp-read', ticks: [0, 0.04, 0.25, 1], place: Math.sqrt,
};

function biasScale(most) {
  return {
    strength: b => Math.abs(b) / most, colour: b => b < 0 ? '--minus' : '--plus', words: signed,
    name: 'nats added to the score', ramp: 'ramp-bias', ticks: [-most, 0, most], place: b => (b / most + 1) / 2,
  };
}

function drawHeat(box, tensor, mode, scale) {
  const { chars } = shown, layer = $('layer').value, head = $('head').value;
  const row = mode === 'head' ? tensor[layer][head] : mode === 'layer' ? mean(tensor[layer]) : null;
  const usual = row ? strongest(chars, row, scale) : 'Point at a cell to read it.';
  const caption = make('p', { className: 'caption', textContent: usual });
  const say = (j, value, prefix = '') => {
    caption.textContent = j < 0 ? usual : `${prefix}${glyph(chars[j])} ${chars.length - j} back: ${scale.words(value)}`;
  };
  const picture = row ? strip(chars, row, scale, say) : rows(chars, tensor, scale, say);
  picture.addEventListener('pointerleave', () => say(-1));
  box.replaceChildren(...box.querySelectorAll('h3'), picture, caption, scaleLegend(scale));
}

function strongest(chars, row, scale) {
  const order = range(row.length).sort((a, b) => Math.abs(row[b]) - Math.abs(row[a])).slice(0, 3);
  return `Strongest: ${order.map(j => `${glyph(chars[j])} ${scale.words(row[j])}`).join(' · ')}`;
}

function strip(chars, row, scale, say) {  // the text itself
  const spans = chars.map((char, j) => {
    const element = span(`w${kind(char)}`, char);
    element.style.setProperty('--strength', `${100 * scale.strength(row[j])}%`);
    element.style.setProperty('--hue', `var(${scale.colour(row[j])})`);
    element.onpointerenter = () => say(j, row[j]);
    return element;
  });
  return make('div', { className: 'strip' }, ...spans);
}

const CELL = 9, ROW = 12;  // pixels of a cell in the rows of all heads

function rows(chars, tensor, scale, say) {  // a thin row for each head, under the characters
  const flat = tensor.flat(), label = k => `L${Math.floor(k / tensor[0].length)} H${k % tensor[0].length}`;
  const canvas = make('canvas', { role: 'img', 'aria-label': 'A row for each head, a column for each character' });
  paintRows(canvas, chars, flat, scale);
  canvas.onpointermove = event => {
    const j = Math.floor(event.offsetX / CELL), k = Math.floor(event.offsetY / ROW - 1.5);
    if (flat[k]?.[j] === undefined) say(-1); else say(j, flat[k][j], `${label(k)}: `);
  };
  const scroller = make('div', { className: 'scroller', tabIndex: 0, role: 'group', 'aria-label': 'All heads' });
  scroller.append(canvas);
  requestAnimationFrame(() => { scroller.scrollLeft = scroller.scrollWidth; });  // the nearest are at the end
  const labels = make('div', { className: 'labels' }, ...flat.map((_, k) => span('', label(k))));
  return make('div', { className: 'rows' }, labels, scroller);
}

function paintRows(canvas, chars, flat, scale) {
  const wide = CELL * chars.length, tall = ROW * (flat.length + 1.5), styles = getComputedStyle(document.body);
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

function legend(box, title, labels) {
  box.replaceChildren(span('quiet', title), ...labels.map((label, k) => span(`p${k}`, label)));
}

// ---------------------------------------------------------------- comparing by surprise

let sheets = [];    // of each model: { model, spans }
let compared = null;

async function compare() {
  const ids = chosen(), text = $('surprise-text').value;
  $('surprise-alert').textContent = ids.length ? '' : 'No model is chosen: tick at least one.';
  if (!ids.length) return;
  save();
  compared?.controller.abort();
  const mine = compared = { controller: new AbortController() };
  try {
    const answer = await (await post('surprise', { models: ids, text }, mine.controller.signal)).json();
    if (compared === mine) showSurprise(Array.from(text), answer.models);
  } catch (error) {
    if (compared === mine) $('surprise-alert').textContent = error.message;
  }
}

function showSurprise(chars, answers) {
  const named = answers.map(answer => ({ ...answer, model: models.get(answer.model) }));
  const good = named.filter(answer => !answer.error), bad = named.filter(answer => answer.error);
  $('surprise-alert').textContent = bad.map(({ model, error }) => `${model.name}: ${error}`).join(' ');
  $('result').hidden = !good.length;
  $('differences').hidden = $('figure').hidden = good.length < 2;
  showSums(good);
  sheets = good.map(answer => newSheet(chars, answer, good));
  $('sheets').replaceChildren(...sheets.map(sheet => sheet.element));
  if (good.length < 2) return;
  showChart(chars, good);
  showPlaces(chars, good);
  light(-1, chars, good);
  $('say').textContent = 'Compared.';
}

function showSums(good) {
  const best = Math.min(...good.map(answer => answer.mean));
  $('sums').replaceChildren(...good.map(({ model, sum, mean }) => {
    const words = good.length < 2 ? '' : mean === best ? 'best' : `+${(mean - best).toFixed(3)}`;
    const row = make('tr', { className: mean === best ? 'best' : '' },
      make('th', { scope: 'row' }, key(), model.name),
      ...[sum.toFixed(1), mean.toFixed(3), words].map(cell => make('td', { textContent: cell })));
    keyed(row, model);
    return row;
  }));
}

function newSheet(chars, { model, nats }, good) {
  const spans = chars.map((char, i) => {
    const shade = nats[i] === null ? 'unseen' : `p${level(Math.exp(-nats[i]))}`;
    const element = span(`c ${shade}${kind(char)}`, char);
    element.dataset.i = i;
    return element;
  });
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

let lit = -1;  // the character that is marked in every text

function light(i, chars, good) {
  for (const { spans } of sheets) {
    spans[lit]?.classList.remove('at');
    spans[i]?.classList.add('at');
  }
  lit = i;
  const ruler = $('ruler');
  ruler?.classList.toggle('on', i >= 0);
  ruler?.setAttribute('transform', `translate(${ruler.dataset.left * 1 + i * ruler.dataset.step} 0)`);
  const nothing = i < 0 || good[0].nats[i] === null;
  $('pointed').replaceChildren(...nothing
    ? ['Point at a place, or at any character of a text, to see it in every text.']
    : [`${glyph(chars[i])} character ${count(i + 1)}, nats: `, values(good, i)]);
}

function values(good, i) {
  return make('span', { className: 'values' }, ...good.map(({ model, nats }) => {
    const value = make('span', { title: model.name }, key(), span('unseen-label', `${model.name} `),
      nats[i].toFixed(nats[i] < 10 ? 2 : 1));
    keyed(value, model);
    return value;
  }));
}

function showPlaces(chars, good) {
  const spread = i => Math.max(...good.map(({ nats }) => nats[i])) - Math.min(...good.map(({ nats }) => nats[i]));
  const read = range(chars.length).filter(i => good[0].nats[i] !== null);
  const order = read.sort((a, b) => spread(b) - spread(a)).slice(0, 8);
  $('places').replaceChildren(...order.map(i => make('li', {}, newPlace(i, chars, good))));
}

function newPlace(i, chars, good) {
  const sorted = [...good].sort((a, b) => a.nats[i] - b.nats[i]);
  const before = chars.slice(Math.max(0, i - 18), i).map(char => char === ' ' ? char : glyph(char)).join('');
  const place = make('span', { className: 'place' }, before, make('mark', { textContent: glyph(chars[i]) }));
  const words = span('quiet', `${sorted[0].model.name} least, ${sorted.at(-1).model.name} most`);
  const button = make('button', { type: 'button' }, place, words, values(good, i));
  button.onpointerenter = button.onfocus = button.onclick = () => {
    light(i, chars, good);
    for (const { spans, text } of sheets) reveal(text, spans[i]);
  };
  return button;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The running sum of what each model pays more (up) or less (down) than the first
function showChart(chars, good) {
  const [first] = good, wide = 520, tall = 190, left = 40, right = wide - 96, top = 12, bottom = tall - 22;
  const lines = good.map(({ nats }) => {
    let sum = 0;
    return nats.map((value, i) => sum += (value ?? 0) - (first.nats[i] ?? 0));
  });
  const low = Math.min(...lines.flat()), high = Math.max(...lines.flat(), low + 0.1);
  const step = (right - left) / Math.max(1, chars.length - 1);
  const x = i => (left + i * step).toFixed(1);
  const y = v => Math.round(10 * (bottom - (v - low) / (high - low) * (bottom - top))) / 10;
  const ends = apart(lines.map(line => y(line.at(-1))), bottom + 8);
  $('chart-caption').textContent = `Nats paid so far, minus those of ${first.model.name}: falling is better`;
  const frame = { viewBox: `0 0 ${wide} ${tall}`, role: 'img', 'aria-labelledby': 'chart-caption' };
  $('chart').replaceChildren(svg('svg', frame,
    ...round(low, high).flatMap(v => [
      svg('line', { class: v === 0 ? 'zero' : '', x1: left, x2: right, y1: y(v), y2: y(v) }),
      svg('text', { x: left - 6, y: y(v) + 4, 'text-anchor': 'end' }, signed(v))]),
    svg('text', { x: left, y: tall - 4 }, '1'),
    svg('text', { x: right, y: tall - 4, 'text-anchor': 'end' }, `character ${count(chars.length)}`),
    svg('line', { id: 'ruler', class: 'ruler', y1: top, y2: bottom, 'data-left': left, 'data-step': step }),
    ...good.flatMap(({ model }, k) => {
      const line = svg('polyline', { class: 'arm', points: lines[k].map((v, i) => `${x(i)},${y(v)}`).join(' ') });
      const lead = svg('line', { class: 'arm', x1: right, y1: y(lines[k].at(-1)), x2: right + 10, y2: ends[k] });
      line.style.stroke = lead.style.stroke = `var(--arm${model.arm})`;
      return [line, lead, svg('text', { x: right + 14, y: ends[k] + 4 }, model.name.slice(0, 14))];
    })));
}

function round(low, high) {  // the round numbers in between, about five of them
  const unit = 10 ** Math.floor(Math.log10(high - low));
  const gap = unit * ([0.2, 0.5, 1, 2].find(k => (high - low) / (k * unit) <= 5) ?? 5), from = Math.ceil(low / gap);
  return range(Math.floor(high / gap) - from + 1).map(k => (from + k) * gap);
}

function apart(heights, most) {  // moves labels until none covers another
  const order = range(heights.length).sort((a, b) => heights[a] - heights[b]), gap = 13, moved = [...heights];
  order.forEach((k, n) => { if (n) moved[k] = Math.max(moved[k], moved[order[n - 1]] + gap); });
  const over = Math.max(0, moved[order.at(-1)] - most);
  return moved.map(height => height - over);
}

// ---------------------------------------------------------------- start

function restore(served) {
  const saved = JSON.parse(session.get('play') ?? 'null');
  const { prompt, temperature, top_k: k, top_p: p, seed, length } = served.defaults;
  const fields = saved?.fields ?? { prompt, temperature, 'top-k': k, 'top-p': p, seed, length, 'surprise-text': LINES };
  for (const id of FIELDS) $(id).value = fields[id] ?? '';
  $('length').max = served.limits.length;
  const known = served.models.some(model => saved?.chosen.includes(model.run));  // other runs may be served now
  let free = served.limits.models;
  for (const model of served.models) {
    const wanted = known ? saved.chosen.includes(model.run) : model.chosen;
    addModel(model, wanted && free-- > 0);
  }
  $('colour').checked = saved?.colour ?? true;
  setTab(saved?.tab ?? 'continue');
}

function listen() {
  $('continue').onclick = () => run();
  $('stop').onclick = stop;
  $('again').onclick = again;
  $('compare').onclick = compare;
  $('unpin').onclick = clearSpot;
  $('models').onchange = syncModels;
  $('modes').onchange = $('layer').onchange = $('head').onchange = showAttention;
  const colour = () => document.body.classList.toggle('plain', !$('colour').checked);
  $('colour').onchange = colour;
  colour();
  for (const [id, action] of [['prompt', () => run()], ['surprise-text', compare]]) {
    $(id).onkeydown = event => {
      if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      action();
    };
  }
  document.addEventListener('keydown', event => { if (event.key === 'Escape') escape(event); });
  document.addEventListener('input', save);
  document.addEventListener('change', save);
}

async function start() {
  setTheme(local.get('theme') ?? undefined);
  system.onchange = () => { if (!document.documentElement.dataset.theme) setTheme(); };
  setUpTabs();
  legend($('legend'), 'at least', [...STEPS.map(percent), 'less']);
  legend($('surprise-legend'), 'nats, at most', [...STEPS.map(p => (-Math.log(p)).toFixed(1)), 'more']);
  try {
    const served = await (await fetch('models')).json();
    if (served.error) throw new Error(served.error);
    limits = served.limits;
    restore(served);
    syncModels();
    listen();
    save();
  } catch (error) {
    $('models-note').textContent = '';
    $('alert').textContent = error instanceof TypeError ? GONE : error.message;
  }
}

start();

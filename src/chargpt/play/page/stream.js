// The texts as they are written: one stream at a time, with the events of all chosen models.

import { append, cards, refresh, remember, resetCard, setStatus } from './cards.js';
import { clearSpot, setSpot } from './inspector.js';
import { choose } from './models.js';
import { reveal } from './characters.js';
import { $, CUT, bytes, count, events, post } from './tools.js';

export let running = null;  // the stream being read: { controller, open: ids of models that have not ended }

const queue = [];           // events that wait for the next frame: more may come than a screen can show
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
    if (!running?.open.has(data.model)) continue;
    const card = cards.get(data.model);
    on[name]?.(card, data);
    touched.add(card);
  }
  touched.forEach(refresh);
  if (touched.size) showProgress();
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
    if (reason !== 'length') return;  // the server stops: what is still open is not finished
    setStatus(card, 'done');
    running.open.delete(card.model.id);
  },
  error(card, { error }) {
    card.problem.textContent = error;
    setStatus(card, 'failed', 'failed');
    running.open.delete(card.model.id);
  },
};

function showProgress() {
  const left = running?.open.size;
  const words = left ? `${left === 1 ? 'One model is' : `${left} models are`} writing` : 'Finished';
  if ($('status').textContent !== words) $('status').textContent = words;  // it is read aloud each time
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

export function stop() {
  if (running) finish('stopped', 'Stopped');
}

export async function run(keep = null) {  // keep: a spot to go on looking at
  stop();
  const prompt = $('prompt').value, ids = choose($('alert'));
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

function settings() {
  const number = id => $(id).value === '' ? null : Number($(id).value);
  return {
    length: number('length'), temperature: number('temperature'), seed: number('seed'),
    top_k: number('top-k'), top_p: number('top-p'),
  };
}

function lookAgain({ card, i }) {
  setSpot(card, i, true);
  card.text.focus({ preventScroll: true });
  reveal(card.text, card.spans[i]);
}

export function again() {
  $('seed').value = Number($('seed').value) + 1;
  run();
}

export function writeInstead({ card, i }, char) {
  $('prompt').value = card.chars.slice(0, i).join('') + char;
  run({ card, i });
}

// Small tools. What the server or the user wrote only ever becomes text nodes.

const GONE = 'The server does not answer. Is “chargpt play” still running? '
  + 'Start it again, then try once more.';
export const CUT = 'The server went away before the text was finished. '
  + 'Start “chargpt play” again, then press Continue.';

export const $ = id => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const span = (className, textContent = '') => make('span', { className, textContent });

// The square in the colour of a model, and that colour, for everything within the element
export const key = () => span('key');
export const keyed = (element, model) => element.style.setProperty('--key', `var(--arm${model.arm})`);

export const range = n => Array.from({ length: n }, (_, i) => i);
export const count = n => n.toLocaleString('en');
export const percent = p => p < 0.0001 ? '< 0.01%' : `${Number((100 * p).toPrecision(p < 0.1 ? 2 : 3))}%`;

export function signed(v) {
  return Number(v.toFixed(2)).toLocaleString('en', { signDisplay: 'exceptZero' }).replace('-', '−');
}

export function bytes(n) {
  const unit = n < 1024 ? 0 : n < 1024 ** 2 ? 1 : 2;
  return `${Number((n / 1024 ** unit).toFixed(1))} ${['B', 'KiB', 'MiB'][unit]}`;
}

export function storage(name) {  // may be forbidden altogether: then the page forgets, and works
  const guard = action => { try { return action(window[name]); } catch { return null; } };
  return {
    get: key => guard(store => JSON.parse(store.getItem(key))),
    set: (key, value) => guard(store => store.setItem(key, JSON.stringify(value))),
  };
}

export async function ask(path, options) {  // the response; an Error in words if it is a refusal, or none
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw options?.signal?.aborted ? error : new Error(GONE);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error ?? `The server answered ${response.status} without saying why.`);
}

export function post(path, body, signal) {
  const headers = { 'Content-Type': 'application/json' };
  return ask(path, { method: 'POST', headers, body: JSON.stringify(body), signal });
}

export async function* events(body) {  // server-sent events: [name, data]
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read().catch(() => { throw new Error(CUT); });
    if (done) return;
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      const name = /^event: (.*)$/m.exec(part), data = /^data: (.*)$/m.exec(part);
      if (name && data) yield [name[1], JSON.parse(data[1])];
    }
  }
}

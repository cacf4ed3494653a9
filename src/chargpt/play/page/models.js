// The models that are served, and which of them are chosen.

import { $, key, keyed, make, range, span } from './tools.js';

const ARMS = 7;  // colours in play.css

export const models = new Map();  // id -> the model as the server describes it, and arm: its colour

const boxes = () => [...document.querySelectorAll('#models input')];
export const chosen = () => boxes().filter(box => box.checked).map(box => Number(box.dataset.model));

export function setUpModels(served, names) {  // names: runs that were chosen before
  const known = served.models.some(model => names?.includes(model.run));  // other runs may be served now
  let free = served.limits.models;
  for (const model of served.models) {
    models.set(model.id, { ...model, arm: model.id % ARMS });
    const checked = (known ? names.includes(model.run) : model.chosen) && free-- > 0;
    const box = make('input', { type: 'checkbox', checked, 'data-model': model.id });
    const loss = model.loss === null ? '' : `${model.loss.toFixed(2)} nats`;
    $('models').append(make('label', { className: 'chip', title: model.run },
      box, key(), span('name', model.name), span('quiet', loss)));
  }
}

export function syncModels(most) {  // colours them, bounds their number; the ids of those that are chosen
  const ids = chosen(), taken = new Set();
  for (const model of ids.map(id => models.get(id))) {  // no two chosen models share a colour
    if (taken.has(model.arm)) model.arm = range(ARMS).find(arm => !taken.has(arm));
    taken.add(model.arm);
  }
  for (const box of boxes()) {
    box.disabled = ids.length >= most && !box.checked;
    keyed(box.parentElement, models.get(Number(box.dataset.model)));
  }
  $('models-note').textContent = models.size > most ? `${most} at most` : '';
  return ids;
}

export function choose(alert) {  // the ids of those that are chosen; if there are none, says so there
  const ids = chosen();
  alert.textContent = ids.length ? '' : 'No model is chosen: tick at least one.';
  return ids;
}

// The page of `chargpt play`: asks for the models, sets everything up, keeps what survives a reload.

import { addCard, cards } from './cards.js';
import { STEPS, legend } from './characters.js';
import { setTab, setUpTabs, setUpTheme } from './frame.js';
import { clearSpot, setUpInspector, showAttention, spot } from './inspector.js';
import { chosen, models, setUpModels, syncModels } from './models.js';
import { again, run, running, stop, writeInstead } from './stream.js';
import { compare, setUpSurprise } from './surprise.js';
import { $, ask, keyed, percent, storage } from './tools.js';

const LINES = 'To be, or not to be, that is the question:\nWhether \'tis nobler in the mind to suffer\n'
  + 'The slings and arrows of outrageous fortune,';
const FIELDS = ['prompt', 'temperature', 'top-k', 'top-p', 'seed', 'length', 'surprise-text'];
const session = storage('sessionStorage');

async function start() {
  setUpTheme(showAttention);  // a canvas keeps the colours that it was drawn with
  setUpTabs();
  setUpSurprise();
  setUpInspector(writeInstead);
  legend($('legend'), 'at least', [...STEPS.map(percent), 'less']);
  try {
    const served = await (await ask('models')).json();
    const saved = session.get('play');
    fill(served, saved);
    setUpModels(served, saved?.chosen);
    models.forEach(addCard);
    showChosen(served.limits.models);
    listen(served.limits.models);
  } catch (error) {
    $('models-note').textContent = '';
    $('alert').textContent = error.message;
  }
  $('main').inert = false;
}

function fill({ defaults, limits }, saved) {
  const { prompt, temperature, top_k: k, top_p: p, seed, length } = defaults;
  const usual = { prompt, temperature, 'top-k': k, 'top-p': p, seed, length, 'surprise-text': LINES };
  for (const id of FIELDS) $(id).value = saved?.fields[id] ?? usual[id] ?? '';
  $('length').max = limits.length;
  $('colour').checked = saved?.colour ?? true;
  showColour();
  setTab(saved?.tab ?? 'continue');
}

function save() {
  session.set('play', {
    fields: Object.fromEntries(FIELDS.map(id => [id, $(id).value])),
    chosen: chosen().map(id => models.get(id).run),  // ids may differ when the server has been started anew
    tab: document.body.dataset.tab,
    colour: $('colour').checked,
  });
}

function showChosen(most) {
  const ids = syncModels(most);
  for (const card of cards.values()) keyed(card.element, card.model);
  $('cards').replaceChildren(...ids.map(id => cards.get(id).element));
  if (spot && !ids.includes(spot.card.model.id)) clearSpot();
}

function showColour() {
  document.body.classList.toggle('plain', !$('colour').checked);
}

function listen(most) {
  $('continue').onclick = () => run();
  $('stop').onclick = stop;
  $('again').onclick = again;
  $('models').onchange = () => showChosen(most);
  $('colour').onchange = showColour;
  for (const [id, action] of [['prompt', () => run()], ['surprise-text', compare]]) {
    $(id).onkeydown = event => {
      if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      action();
    };
  }
  addEventListener('keydown', event => { if (event.key === 'Escape') escape(event); });
  addEventListener('pagehide', save);
}

function escape(event) {  // unpins where one is looking, stops elsewhere
  const looking = spot?.pinned && document.activeElement.closest('.card, #inspector');
  if (running && !looking) stop(); else if (spot) clearSpot(); else return;
  event.preventDefault();
}

start();

// What is around the views: the theme, and the tabs.

import { $, storage } from './tools.js';

const local = storage('localStorage');
const system = matchMedia('(prefers-color-scheme: dark)');

export function setUpTheme(repaint) {  // repaint(): what does not follow a change of colours by itself
  const root = document.documentElement;
  const isDark = () => root.dataset.theme ? root.dataset.theme === 'dark' : system.matches;
  const show = () => {
    $('theme').textContent = isDark() ? 'Light' : 'Dark';
    repaint();
  };
  const own = local.get('theme');
  if (own === 'light' || own === 'dark') root.dataset.theme = own;
  $('theme').onclick = () => {
    root.dataset.theme = isDark() ? 'light' : 'dark';
    local.set('theme', root.dataset.theme);
    show();
  };
  system.onchange = show;
  show();
}

const tabs = [...document.querySelectorAll('[role=tab]')];

export function setTab(name) {
  for (const tab of tabs) {
    const on = tab.id === `tab-${name}`;
    tab.setAttribute('aria-selected', on);
    tab.tabIndex = on ? 0 : -1;
    $(tab.getAttribute('aria-controls')).hidden = !on;
  }
  document.body.dataset.tab = name;
}

export function setUpTabs() {
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

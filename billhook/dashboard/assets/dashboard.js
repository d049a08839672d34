'use strict';
/* What live pages do: follow events, sort, filter and mark the table of runs, move along the path of a search. */

const $$ = (query, root = document) => [...root.querySelectorAll(query)];

/* -- news: each event holds HTML of parts by the id of the element that it replaces -- */

function follow() {
  const address = document.body.dataset.events, line = document.querySelector('#line');
  if (!address) return;
  const source = new EventSource(address);
  source.addEventListener('open', () => { line.textContent = 'live'; line.className = ''; });
  source.addEventListener('error', () => { line.textContent = 'not connected'; line.className = 'gone'; });
  source.addEventListener('parts', event => {
    for (const [id, html] of Object.entries(JSON.parse(event.data))) replace(id, html);
    if (document.querySelector('#rows')) arrange();
  });
  addEventListener('pagehide', () => source.close());
  addEventListener('pageshow', event => event.persisted && follow());
}

function replace(id, html) {
  const box = document.createElement('template');
  box.innerHTML = html;
  const made = box.content.firstElementChild, old = document.getElementById(id);
  if (!made) return;
  if (old) {
    keepChoices(old, made);
    old.replaceWith(made);
  } else if (id.startsWith('row-')) {
    document.querySelector('#rows').prepend(made);
  } else return;
  begin(made);
}

/* What a person has ticked, opened, moved or focused stays so. */
function keepChoices(old, made) {
  for (const box of $$('input[type=checkbox]:checked', old))
    for (const same of $$('input[type=checkbox]', made)) if (same.value === box.value) same.checked = true;
  const opened = $$('details', old).map(each => each.open);
  $$('details', made).forEach((each, i) => { each.open = opened[i] ?? each.open; });
  const at = document.activeElement, key = at && old.contains(at) && (at.id || at.getAttribute('href') || at.value);
  if (key) queueMicrotask(() => $$('a, input, button, select, [tabindex]', made)
    .find(each => [each.id, each.getAttribute('href'), each.value].includes(key))?.focus({preventScroll: true}));
}

function begin(root) {
  if (root.querySelector('.plot')) { followKeys(root); drawCharts(root); }
  if (typeof followPage === 'function') followPage(root);
  for (const path of $$('.path', root)) followPath(path);
}

/* -- the table of runs -- */

const choices = {sort: '', down: false, all: false};

function arrange() {
  const body = document.querySelector('#rows'), rows = [...body.rows];
  const wanted = Object.fromEntries($$('[data-filter]').map(each => [each.dataset.filter, each.value]));
  const words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = row => {
    const {state, kind, model, tags} = row.dataset;
    return (!wanted.state || state === wanted.state) && (!wanted.kind || kind === wanted.kind) &&
      (!wanted.model || model === wanted.model) && (!wanted.tag || tags.split(' ').includes(wanted.tag)) &&
      (!words.length || (text => words.every(word => text.includes(word)))(row.textContent.toLowerCase()));
  };
  addTags(rows);
  const found = (choices.sort ? order(body, rows) : rows).filter(fits), shown = new Set(choices.all ? found : found.slice(0, +body.dataset.most));
  for (const row of rows) row.hidden = !shown.has(row);
  mark(found);
  count(rows, found);
  const query = new URLSearchParams(Object.entries({...wanted, sort: choices.sort, down: choices.down ? '1' : ''}).filter(([, v]) => v));
  history.replaceState(null, '', location.pathname + (query.size ? '?' + query : ''));
}

/* Tags that came while the page was open. */
function addTags(rows) {
  const list = document.querySelector('[data-filter=tag]'), known = new Set([...list.options].map(each => each.value));
  for (const tag of new Set(rows.flatMap(row => row.dataset.tags.split(' '))))
    if (tag && !known.has(tag)) list.add(new Option(tag, tag));
}

function column(name) {
  return $$('#runs thead th').findIndex(head => head.textContent === name) + 1;
}

function order(body, rows) {
  const at = column(choices.sort), text = $$('#runs thead th')[at - 1].dataset.sort === 'text', sign = choices.down ? -1 : 1;
  const value = row => row.cells[at].dataset.value;
  const sorted = rows.map(row => [value(row), row]).sort(([a], [b]) => {
    if (a === '' || b === '') return (a === '') - (b === '');
    return sign * (text ? a.localeCompare(b, undefined, {numeric: true}) : a - b);
  });
  const found = sorted.map(([, row]) => row);
  if (found.some((row, i) => row !== rows[i])) body.append(...found);
  return found;
}

/* The best of every column among the runs of one model. */
function mark(rows) {
  for (const cell of $$('#rows td.best')) { cell.classList.remove('best'); cell.querySelector('.aloud')?.remove(); }
  const models = Map.groupBy ? Map.groupBy(rows, row => row.dataset.model) : new Map([['', rows]]);
  $$('#runs thead th').forEach((head, i) => {
    if (!head.dataset.best) return;
    for (const peers of models.values()) {
      const cells = peers.map(row => row.cells[i + 1]).filter(cell => cell.dataset.value !== '');
      const best = Math[head.dataset.best === 'low' ? 'min' : 'max'](...cells.map(cell => +cell.dataset.value));
      if (new Set(cells.map(cell => cell.dataset.value)).size < 2) continue;
      for (const cell of cells.filter(each => +each.dataset.value === best)) {
        cell.classList.add('best');
        const said = document.createElement('span');
        said.className = 'aloud';
        said.textContent = ' best';
        cell.append(said);
      }
    }
  });
}

function count(rows, found) {
  const ticked = $$('#rows input:checked').length, more = document.querySelector('#more'), most = +document.querySelector('#rows').dataset.most;
  document.querySelector('#count').textContent = `${found.length} of ${rows.length} shown` + (ticked ? `, ${ticked} selected` : '');
  document.querySelector('#compare').disabled = ticked < 2;
  more.hidden = choices.all || found.length <= most;
  more.textContent = `Show ${found.length - most} more`;
}

/* The rows after the first ones come once the page is there. */
async function loadRest(body) {
  const answer = await fetch(body.dataset.rest), box = document.createElement('template');
  box.innerHTML = await answer.text();
  for (const row of box.content.querySelectorAll('tr')) if (!document.getElementById(row.id)) { row.hidden = true; body.append(row); }
  arrange();
}

function followTable() {
  const asked = new URLSearchParams(location.search);
  choices.sort = column(asked.get('sort')) ? asked.get('sort') || '' : '';
  choices.down = asked.has('down');
  for (const field of $$('[data-filter]')) {
    if (asked.has(field.dataset.filter)) {
      if (field.options && ![...field.options].some(each => each.value === asked.get(field.dataset.filter))) continue;
      field.value = asked.get(field.dataset.filter);
    }
    field.addEventListener('input', arrange);
  }
  document.querySelector('#rows').addEventListener('change', arrange);
  document.querySelector('#more').addEventListener('click', () => { choices.all = true; arrange(); });
  for (const head of $$('#runs thead th')) {
    head.addEventListener('click', () => {
      choices.down = choices.sort === head.textContent ? !choices.down : false;
      choices.sort = head.textContent;
      showOrder();
      arrange();
    });
  }
  document.querySelector('#runs').addEventListener('keydown', event => {
    if (event.key === 'Enter' && event.target.dataset.filter) event.preventDefault();
  });
  showOrder();
  arrange();
  const body = document.querySelector('#rows');
  if (body.dataset.rest) (window.requestIdleCallback || setTimeout)(() => loadRest(body));
}

function showOrder() {
  for (const head of $$('#runs thead th')) {
    if (head.textContent === choices.sort) head.setAttribute('aria-sort', choices.down ? 'descending' : 'ascending');
    else head.removeAttribute('aria-sort');
  }
}

/* -- the path of a search: a handle, below the chart or on it -- */

function followPath(path) {
  const handle = path.querySelector('input[type=range]'), plot = path.querySelector('.plot');
  if (!handle) return;
  const points = $$('.point', path);
  const show = () => {
    points.forEach((point, i) => { point.hidden = i !== +handle.value; });
    handle.setAttribute('aria-valuetext', points[+handle.value].querySelector('h3').textContent);
    if (plot && typeof echarts !== 'undefined') cursor(plot, +points[+handle.value].dataset.x);
  };
  handle.addEventListener('input', show);
  if (plot) {
    const drag = event => {
      const chart = echarts.getInstanceByDom(plot), x = chart.convertFromPixel({xAxisIndex: 0}, event.offsetX);
      const gaps = points.map(point => Math.abs(+point.dataset.x - x));
      handle.value = gaps.indexOf(Math.min(...gaps));
      show();
    };
    plot.addEventListener('pointerdown', event => { plot.setPointerCapture(event.pointerId); drag(event); });
    plot.addEventListener('pointermove', event => event.buttons && drag(event));
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => setTimeout(show));
  }
  setTimeout(show);
}

/* A line downwards at `x`. */
function cursor(plot, x) {
  const line = {id: 'cursor', type: 'scatter', data: [], silent: true, animation: false, markLine: {silent: true, symbol: 'none', animation: false,
    label: {show: false}, lineStyle: {color: colour('--removed'), type: [4, 3], width: 1.5}, data: [{xAxis: x}]}};
  echarts.getInstanceByDom(plot)?.setOption({series: [line]});
}

/* -- a form whose answer is put in place while it is filled in -- */

function followForm(form) {
  let waiting = 0, asked = 0;
  const send = async () => {
    const query = '?' + new URLSearchParams(new FormData(form)), mine = ++asked;
    const answer = await fetch(form.getAttribute('action') + query);
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
    const made = page.getElementById(form.dataset.send);
    if (!made || mine !== asked) return;
    history.replaceState(null, '', location.pathname + query);
    replace(form.dataset.send, made.outerHTML);
  };
  form.addEventListener('input', event => {
    const output = event.target.parentElement.querySelector('output');
    if (output) output.textContent = event.target.value;
    if (event.target.tagName === 'SELECT' && ['run', 'unit'].includes(event.target.name)) {
      form.querySelector('[name=amount]').disabled = true;  // another scale: begin where the run ends
      form.requestSubmit();
      return;
    }
    clearTimeout(waiting);
    waiting = setTimeout(send, 60);
  });
}

/* -- times that pass -- */

function duration(seconds) {
  if (seconds < 59.95) return seconds.toFixed(0) + ' s';
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

setInterval(() => {
  for (const each of $$('.age')) each.textContent = duration(Math.max(0, Date.now() / 1000 - each.dataset.since));
}, 1000);

/* -- commands: a button copies -- */

document.addEventListener('click', async event => {
  const button = event.target.closest('.command button');
  if (!button) return;
  await navigator.clipboard.writeText(button.parentElement.querySelector('pre').textContent);
  button.textContent = 'copied';
});

document.addEventListener('DOMContentLoaded', () => {
  if (document.querySelector('#rows')) followTable();
  for (const path of $$('.path')) followPath(path);
  for (const form of $$('form[data-send]')) followForm(form);
  follow();
});

/* -- comparing: focus and points of a chart single a student out, as pointing at its name does -- */

function followLinks(group) {
  const buttons = $$('button[data-series]', group), only = name => {
    const before = buttons.filter(button => 'pointed' in button.dataset).map(button => button.dataset.series);
    if (before.length === (name ? 1 : 0) && before.every(each => each === name)) return;
    for (const button of buttons) {
      if (button.dataset.series === name) button.dataset.pointed = '';
      else delete button.dataset.pointed;
    }
    drawCharts(group);
  };
  for (const button of buttons) {
    button.addEventListener('focus', () => only(button.dataset.series));
    button.addEventListener('blur', () => only(''));
  }
  for (const plot of $$('.plot', group)) {
    const chart = echarts.getInstanceByDom(plot);
    chart.on('mouseover', told => told.seriesName && buttons.some(each => each.dataset.series === told.seriesName) && only(told.seriesName));
    chart.on('globalout', () => only(''));
  }
}

document.addEventListener('DOMContentLoaded', () => { for (const group of $$('.linked')) followLinks(group); });

'use strict';
/* What pages do besides charts: numbers become styles, the strip of sites has keys, tables sort, items are searched. */

/* `data-vars="left:60%;n:10"` sets custom properties, which a Content-Security-Policy forbids as an attribute. */
function setVars(root = document) {
  for (const each of root.querySelectorAll('[data-vars]'))
    for (const part of each.dataset.vars.split(';')) {
      const [name, value] = part.split(':');
      each.style.setProperty('--' + name, value);
    }
}

/* The strip: one tab stop, arrows move along blocks and parts, hovering or focusing a site tells about it. */
function followStrip(map, tip) {
  let told = null;
  function tell(cell) {
    told = cell;
    tip.hidden = !cell;
    if (!cell) return;
    tip.textContent = cell.getAttribute('aria-label');
    const at = cell.getBoundingClientRect(), above = at.top - tip.offsetHeight - 8;
    tip.style.left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + 'px';
    tip.style.top = (above < 8 ? at.bottom + 8 : above) + 'px';
  }
  for (const kind of ['mouseover', 'focusin']) map.addEventListener(kind, event => tell(event.target.closest('button')));
  for (const kind of ['mouseleave', 'focusout']) map.addEventListener(kind, () => tell(null));
  for (const kind of ['scroll', 'resize']) addEventListener(kind, () => tell(told), {passive: true});
  map.addEventListener('keydown', event => {
    if (event.key === 'Escape') tell(null);
    const [part, block] = (event.target.dataset.site || '').split('.');
    const to = {ArrowLeft: [part, block - 1], ArrowRight: [part, +block + 1], ArrowUp: ['attention', block],
      ArrowDown: ['mlp', block]}[event.key];
    const next = to && map.querySelector('[data-site="' + to.join('.') + '"]');
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

/* A heading sorts by its column, once more the other way round; `data-words`: its column holds words. */
function sortByHeadings(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending', text = 'words' in head.dataset;
    for (const other of heads) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const value = row => row.cells[column].dataset.sort;
    const order = (a, b) => (text ? a.localeCompare(b, undefined, {numeric: true}) : a - b);
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))));
  }));
}

/* The items of `box` that hold all words, and that the chosen model has right. */
function searchItems(box) {
  const [find, who] = box.querySelectorAll('input, select'), told = box.querySelector('output');
  const items = [...box.querySelectorAll('article')];
  function show() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const item of items) {
      const text = item.textContent.toLowerCase();
      const fits = (!who.value || item.dataset.who === who.value) && words.every(word => text.includes(word));
      item.hidden = !fits;
      n += fits;
    }
    told.textContent = n + ' of ' + items.length + ' shown';
  }
  find.addEventListener('input', show);
  who.addEventListener('input', show);
  show();
}

/* A drawing as a file, with the colours that it has on this page, as SVG or twice as large as PNG. */
const DRAWN = ['fill', 'stroke', 'stroke-dasharray', 'font-family', 'font-size', 'font-weight', 'text-anchor'];

function drawingText(svg) {
  const copy = svg.cloneNode(true), shown = svg.querySelectorAll('text, rect');
  copy.querySelectorAll('text, rect').forEach((each, i) => {
    const style = getComputedStyle(shown[i]);
    for (const name of DRAWN) each.setAttribute(name, style.getPropertyValue(name));
  });
  const ground = document.createElementNS(svg.namespaceURI, 'rect');
  ground.setAttribute('width', '100%');
  ground.setAttribute('height', '100%');
  ground.setAttribute('fill', getComputedStyle(document.documentElement).backgroundColor);
  copy.prepend(ground);
  return new XMLSerializer().serializeToString(copy);
}

async function saveDrawing(svg, kind) {
  const text = drawingText(svg), link = document.createElement('a');
  let file = new Blob([text], {type: 'image/svg+xml'});
  if (kind === 'png') {
    const image = new Image(), canvas = document.createElement('canvas');
    image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(text);
    await image.decode();
    canvas.width = 2 * svg.width.baseVal.value;
    canvas.height = 2 * svg.height.baseVal.value;
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    file = await new Promise(done => canvas.toBlob(done));
  }
  link.href = URL.createObjectURL(file);
  link.download = 'architecture.' + kind;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/* Everything below `root`, once. */
function followPage(root = document) {
  setVars(root);
  const tip = document.querySelector('#tip');
  if (tip) for (const map of root.querySelectorAll('.map')) followStrip(map, tip);
  for (const table of root.querySelectorAll('.sortable')) sortByHeadings(table);
  for (const box of root.querySelectorAll('.flips')) searchItems(box);
  for (const button of root.querySelectorAll('[data-save]'))
    button.addEventListener('click', () => saveDrawing(button.closest('.drawn').querySelector('svg'), button.dataset.save));
}

document.addEventListener('DOMContentLoaded', () => followPage());

'use strict';
/* Charts of all pages. A `.plot` holds an ECharts option as JSON in `data-option`, or several by name, of which
   `data-shown` says which is drawn. JSON holds no functions, so the option names them:

   "--orange", "--orange/30"  a colour of style.css, for light and dark; the second with 30% of its opacity
   "@ratio", "@percent" …     as a `formatter`: how a number is written, see FORMATS
   type "@interval"           data [x, value, low, high]: a dot with whiskers; with `across`, x lies on the y axis
   type "@band"               data [x, low, high]: the area between two lines
   tip                        of a data item: what its tooltip says, and what is read aloud

   Axis names are HTML above and below the plot, where no number is. Arrow keys go from point to point. */

const FORMATS = {
  number: x => short(x),
  ratio: x => '×' + (Math.abs(x) < 100 ? String(+x.toPrecision(3)) : short(x)),
  nats_as_ratio: x => FORMATS.ratio(Math.exp(x)),
  exp: x => short(Math.exp(x)),
  nats: x => String(+x.toPrecision(3)),
  percent: x => String(+x.toPrecision(4)) + '%',
  share: x => String(+(100 * x).toPrecision(4)) + '%',
  points: x => (x > 0 ? '+' : '') + String(+x.toPrecision(3)) + ' pp',
  bytes: x => short(x, 'B'),
  seconds: x => (Math.abs(x) < 1 ? String(+(1000 * x).toPrecision(3)) + ' ms' : short(x) + ' s'),
  integer: x => (Number.isInteger(x) ? x.toLocaleString('en') : ''),
};
for (const name of Object.keys(FORMATS)) {
  const plain = FORMATS[name];
  FORMATS[name] = x => plain(x).replace('-', '−');
}

/* Outlines in a box of 16 × 16, as in the keys. */
const LARGER = {diamond: 1.3, star: 1.4, triangle: 1.15, down: 1.15, cross: 1.1, plus: 1.15, arrow: 1.4};
const SYMBOLS = {
  circle: 'M14 8A6 6 0 1 1 2 8a6 6 0 1 1 12 0z',
  square: 'M3 3h10v10H3z',
  diamond: 'M8 1l7 7-7 7-7-7z',
  triangle: 'M8 2l7 12H1z',
  cross: 'M5 2l3 3 3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3-3-3z',
  down: 'M8 14L1 2h14z',
  plus: 'M6 2h4v4h4v4h-4v4H6v-4H2V6h4z',
  star: 'M8 .5l2 5.3h5.6l-4.5 3.5 1.7 5.7L8 11.6l-4.8 3.4 1.7-5.7L.4 5.8H6z',
  arrow: 'M8 1l6 7h-4v7H6V8H2z',
};

function short(x, unit = '') {
  const size = Math.abs(x), few = +x.toPrecision(unit ? 4 : 6);
  if (size >= 1e15) return x.toExponential(0) + (unit && ' ' + unit);
  const [scale, prefix] = [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [unit ? 1e3 : 1e6, 'k']].find(([s]) => size >= s) || [1, ''];
  return (+(few / scale).toPrecision(6)).toLocaleString('en') + (unit || prefix ? ' ' : '') + prefix + unit;
}

/* -- from the option on the page to the one that ECharts takes -- */

function colour(name) {
  const [tone, opacity] = name.slice(2).split('/');
  const value = getComputedStyle(document.documentElement).getPropertyValue('--' + tone).trim();
  return opacity === undefined ? value : echarts.color.modifyAlpha(value, +opacity / 100);
}

function resolve(value, key) {
  if (Array.isArray(value)) return value.map(each => resolve(each, key));
  if (value !== null && typeof value === 'object') {
    const whole = Object.fromEntries(Object.entries(value).map(([name, each]) => [name, name === 'tip' ? each : resolve(each, name)]));
    return whole.type === '@interval' ? intervals(whole) : whole.type === '@band' ? band(whole) : whole;
  }
  if (typeof value !== 'string') return value;
  if (/color$/i.test(key) && value.startsWith('--')) return colour(value);
  if (key === 'formatter' && value.startsWith('@')) return FORMATS[value.slice(1)];
  return value;
}

function intervals(series) {
  const {across, shift = 0, hollow, size = 12, color, symbol = 'circle', lineStyle, ...rest} = series;
  const place = (api, x, y) => {
    const at = api.coord(across ? [y, x] : [x, y]);
    at[across ? 1 : 0] += shift;
    return at;
  };
  return {z: 3, ...rest, type: 'custom', color, itemStyle: {color}, clip: false,
    encode: across ? {y: 0, x: [1, 2, 3]} : {x: 0, y: [1, 2, 3]},
    renderItem(params, api) {
      const [x, value, low, high] = [0, 1, 2, 3].map(i => api.value(i));
      if (!Number.isFinite(value)) return null;
      const item = series.data[params.dataIndex] || {}, tone = item.color || color;
      const stroke = {stroke: tone, lineWidth: 2, opacity: rest.opacity}, [px, py] = place(api, x, value);
      const name = item.symbol || symbol, wide = size * (LARGER[name] || 1);
      const parts = [], open = item.hollow ?? hollow;  // parts say x and y: one that takes another's place keeps its own
      if (Number.isFinite(low) && Number.isFinite(high) && high > low) {
        const cap = across ? [0, 4] : [4, 0], ends = [place(api, x, low), place(api, x, high)];
        const [a, b] = ends.map(end => within(end, params.coordSys));
        parts.push({type: 'line', x: 0, y: 0, style: stroke, shape: {x1: a[0], y1: a[1], x2: b[0], y2: b[1]}});
        for (const end of [a, b].filter((end, i) => end[0] === ends[i][0] && end[1] === ends[i][1]))
          parts.push({type: 'line', x: 0, y: 0, style: stroke, shape: {x1: end[0] - cap[0], y1: end[1] - cap[1], x2: end[0] + cap[0], y2: end[1] + cap[1]}});
      }
      parts.push({type: 'path', x: px, y: py, shape: {pathData: SYMBOLS[name], x: -wide / 2, y: -wide / 2, width: wide, height: wide},
        style: {fill: open ? colour('--ground') : tone, stroke: open ? tone : colour('--ground'), lineWidth: open ? 2 : 1, opacity: rest.opacity}});
      return {type: 'group', children: parts};
    }};
}

/* What lies beyond the axes ends at the edge, and has no cap there. */
function within([x, y], area) {
  return [Math.min(Math.max(x, area.x), area.x + area.width), Math.min(Math.max(y, area.y), area.y + area.height)];
}

function band(series) {
  const {color, ...rest} = series;
  return {z: 1, silent: true, ...rest, type: 'custom', color, itemStyle: {color}, encode: {x: 0, y: [1, 2]},
    renderItem(params, api) {
      if (params.dataIndexInside) return null;
      const known = [...Array(params.dataInsideLength).keys()].filter(i => Number.isFinite(api.value(1, i)) && Number.isFinite(api.value(2, i)));
      const side = end => known.map(i => api.coord([api.value(0, i), api.value(end, i)]));
      return {type: 'polygon', shape: {points: [...side(1), ...side(2).reverse()]}, style: {fill: color, opacity: 0.25 * (rest.opacity ?? 1)}};
    }};
}

function styled(option) {
  const axis = (one, onZero) => ({nameGap: 0, ...one, name: '',
    axisLine: {onZero, lineStyle: {color: colour('--dim')}, ...one.axisLine},
    axisTick: {lineStyle: {color: colour('--dim')}, ...one.axisTick},
    axisLabel: {color: colour('--dim'), fontSize: 12, hideOverlap: true, ...one.axisLabel},
    splitLine: {show: one.type !== 'category', lineStyle: {color: colour('--line')}, ...one.splitLine}});
  const calm = !option.animation || matchMedia('(prefers-reduced-motion: reduce)').matches;
  return {...option, animation: !calm, xAxis: axis(option.xAxis || {}, true), yAxis: axis(option.yAxis || {}, false),
    textStyle: {fontFamily: 'system-ui, sans-serif', color: colour('--ink')},
    grid: {left: 6, right: 16, top: 12, bottom: 6, outerBoundsMode: 'same', outerBoundsContain: 'axisLabel', ...option.grid},
    tooltip: {renderMode: 'richText', confine: true, backgroundColor: colour('--ink'), borderWidth: 0, padding: [6, 9],
      textStyle: {color: colour('--ground'), fontSize: 12.5, lineHeight: 18}, formatter: told => told.data.tip ?? told.name, ...option.tooltip}};
}

/* -- drawing -- */

const watched = new ResizeObserver(entries => entries.forEach(({target}) => echarts.getInstanceByDom(target)?.resize()));

function shown(box) {
  const option = JSON.parse(box.dataset.option);
  return 'shown' in box.dataset ? option[box.dataset.shown] : option;
}

function draw(box) {
  box.style.height = box.dataset.height + 'px';
  const raw = shown(box), figure = box.closest('.chart');
  const chart = echarts.getInstanceByDom(box) || echarts.init(box);
  const lit = litIn(figure), option = resolve(raw, '');
  for (const each of option.series) if (lit.size && each.name && !lit.has(each.name)) dim(each);
  for (const [side, axis] of [['above', raw.yAxis], ['below', raw.xAxis]]) {
    const words = figure.querySelector('.axis.' + side);
    words.textContent = axis?.name ?? '';
  }
  chart.setOption(styled(option), true);
  watched.observe(box);
  if (!box.dataset.keys) listen(box, figure);
}

function dim(series) {
  series.opacity = 0.12;
  if (series.lineStyle) series.lineStyle = {...series.lineStyle, opacity: 0.12};
  series.itemStyle = {...series.itemStyle, opacity: 0.12};
  const render = series.renderItem;
  if (render) series.renderItem = (params, api) => fade(render(params, api));
}

function fade(shape) {
  for (const each of shape?.children ?? (shape ? [shape] : [])) each.style.opacity = 0.12 * (each.style.opacity ?? 1);
  return shape;
}

/* Draw every chart below `root`, or draw it again. */
function drawCharts(root = document) {
  for (const box of root.querySelectorAll('.plot')) draw(box);
}

/* -- keys: arrows go from point to point, and what the tooltip says is read aloud -- */

function listen(box, figure) {
  box.dataset.keys = 'on';
  let at = -1;
  const say = words => { figure.querySelector('output').textContent = words; };
  const hide = () => { at = -1; echarts.getInstanceByDom(box).dispatchAction({type: 'hideTip'}); say(''); };
  box.addEventListener('blur', hide);
  box.addEventListener('keydown', event => {
    if (event.key === 'Escape') return hide();
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return undefined;
    event.preventDefault();
    const stops = shown(box).series.flatMap((series, seriesIndex) =>
      (series.data || []).flatMap((item, dataIndex) => (item?.tip ? [{seriesIndex, dataIndex, tip: item.tip}] : [])));
    if (!stops.length) return undefined;
    at = at < 0 && step < 0 ? stops.length - 1 : (at + step + stops.length) % stops.length;
    const {seriesIndex, dataIndex, tip} = stops[at];
    echarts.getInstanceByDom(box).dispatchAction({type: 'showTip', seriesIndex, dataIndex});
    return say(tip);
  });
}

/* -- keys of several charts: a button with `data-series` singles that series out in every chart of its `.linked` -- */

function litIn(figure) {
  const group = figure.closest('.linked');
  if (!group) return new Set();
  const pressed = group.querySelectorAll('[data-series][aria-pressed=true], [data-series][data-pointed]');
  return new Set([...pressed].map(button => button.dataset.series));
}

function followKeys(root = document) {
  for (const button of root.querySelectorAll('button[data-series]')) {
    const again = () => drawCharts(button.closest('.linked'));
    button.addEventListener('mouseenter', () => { button.dataset.pointed = ''; again(); });
    button.addEventListener('mouseleave', () => { delete button.dataset.pointed; again(); });
    button.addEventListener('click', () => {
      button.setAttribute('aria-pressed', button.getAttribute('aria-pressed') !== 'true');
      again();
    });
  }
  for (const group of root.querySelectorAll('[data-switch]')) {
    group.addEventListener('click', event => {
      const button = event.target.closest('button'), box = group.closest('.chart').querySelector('.plot');
      if (!button) return;
      for (const other of group.querySelectorAll('button')) other.setAttribute('aria-pressed', other === button);
      const pressed = box.closest('.chart').querySelectorAll('[data-switch] [aria-pressed=true]');
      box.dataset.shown = [...pressed].map(each => each.dataset.value).join(' ');
      draw(box);
    });
  }
}

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => drawCharts());
document.addEventListener('DOMContentLoaded', () => { followKeys(); drawCharts(); });

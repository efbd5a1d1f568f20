"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [I, J, K] = data.size;
  const SIZE = data.size;
  // plane: normal axis, axis across, axis up
  const PLANES = [["axial", 2, 0, 1], ["coronal", 1, 0, 2], ["sagittal", 0, 1, 2]];
  const ENDS = [["L", "R"], ["P", "A"], ["I", "S"]];
  const BLUE = "#0072B2", ORANGE = "#E69F00";
  const byId = (id) => document.getElementById(id);

  /* A volume is a mosaic of its axial slices, `columns` side by side; k-th slice, row j, column i. */
  async function volume(name) {
    const { src, columns, channels } = data.volumes[name];
    const image = new Image();
    image.src = src;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.width, canvas.height = image.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    const [ni, nj, nk] = data.volumes[name].size;
    const out = Array.from({ length: channels }, () => new Uint8Array(ni * nj * nk));
    for (let k = 0; k < nk; k++) {
      const left = (k % columns) * ni, top = Math.floor(k / columns) * nj;
      for (let j = 0; j < nj; j++)
        for (let i = 0; i < ni; i++)
          for (let c = 0; c < channels; c++)
            out[c][(k * nj + j) * ni + i] = pixels[4 * ((top + j) * image.width + left + i) + c];
    }
    return out;
  }

  const scans = {};
  for (const name of Object.keys(data.volumes)) scans[name] = await volume(name);
  const at = (i, j, k) => (k * J + j) * I + i;

  const state = {
    view: data.view, flicker: false, first: false, swipe: null, edges: data.edges, folds: data.folds, labels: false, landmarks: !!data.landmarks.length,
    width: 1, level: 0.5, radiological: data.radiological, at: data.middle.slice(), plane: 0,
  };
  const LAYERS = ["edges", "folds", "labels", "landmarks"], OTHER = { edges: "labels", labels: "edges" };
  const VIEWS = ["fixed", "before", "after", "difference", "grid", "volume change", "displacement"];

  /* ---- what is shown ---- */

  function slice(plane) {
    const [, n, u, v] = PLANES[plane], index = state.at.slice();
    return (channel, f) => {
      const out = new Float32Array(SIZE[u] * SIZE[v]);
      for (let b = 0; b < SIZE[v]; b++)
        for (let a = 0; a < SIZE[u]; a++) {
          index[n] = state.at[n], index[u] = a, index[v] = b;
          const value = channel[at(...index)];
          out[b * SIZE[u] + a] = f ? f(value) : value;
        }
      return out;
    };
  }

  function grey(value) {
    const low = 255 * (state.level - state.width / 2);
    return Math.max(0, Math.min(255, 255 * (value - low) / (255 * state.width)));
  }

  function ramp(stops, t) {  // colour at 0..1
    const x = Math.max(0, Math.min(1, t)) * (stops.length - 1), n = Math.min(Math.floor(x), stops.length - 2), r = x - n;
    return stops[n].map((c, m) => c + r * (stops[n + 1][m] - c));
  }
  const hex = (colour) => [1, 3, 5].map((n) => parseInt(colour.slice(n, n + 2), 16));
  const PURPLES = data.purples.map(hex), LENGTHS = data.lengths.map(hex), YELLOW_CSS = "#F0E442", YELLOW = hex(YELLOW_CSS);
  const CSS = (stops) => "linear-gradient(to right," + stops.map((c) => `rgb(${c})`).join(",") + ")";

  function pixels(plane, view) {
    const take = slice(plane), [, , u, v] = PLANES[plane];
    const image = new ImageData(SIZE[u], SIZE[v]), out = image.data;
    const put = (n, colour) => { out[4 * n] = colour[0]; out[4 * n + 1] = colour[1]; out[4 * n + 2] = colour[2]; out[4 * n + 3] = 255; };
    if (view === "difference") {
      const f = take(scans.fixed[0]), w = take(scans.after[0]);
      for (let n = 0; n < f.length; n++) {
        const d = (w[n] - f[n]) / 255 / state.width;
        put(n, d < 0 ? [255 * (1 + d), 255 * (1 + 0.55 * d), 255 * (1 + 0.3 * d)] : [255 - 25 * d, 255 * (1 - 0.38 * d), 255 * (1 - d)]);
      }
    } else if (view === "volume change") {
      const j = take(scans.jacobian[0]);
      for (let n = 0; n < j.length; n++) put(n, j[n] === 0 ? YELLOW : ramp(PURPLES, (j[n] - 1) / 254));
    } else if (view === "displacement") {
      const d = [0, 1, 2].map((c) => moves(plane, c));
      for (let n = 0; n < d[0].length; n++) put(n, ramp(LENGTHS, Math.hypot(d[0][n], d[1][n], d[2][n]) * data.mm / data.longest));
    } else {
      const scan = take(scans[view === "grid" ? "fixed" : view][0]);
      for (let n = 0; n < scan.length; n++) {
        const g = view === "grid" ? 255 - grey(scan[n]) / 2.5 : grey(scan[n]);
        put(n, [g, g, g]);
      }
    }
    return image;
  }

  /* One component of the displacement in voxels on a plane; it is stored on every `every`th voxel. */
  function moves(plane, component) {
    const [, n, u, v] = PLANES[plane], channel = scans.disp[component], [ni, nj, nk] = data.volumes.disp.size;
    const last = [ni - 1, nj - 1, nk - 1], out = new Float32Array(SIZE[u] * SIZE[v]), place = state.at.slice();
    for (let b = 0; b < SIZE[v]; b++)
      for (let a = 0; a < SIZE[u]; a++) {
        place[n] = state.at[n], place[u] = a, place[v] = b;
        const p = place.map((x, c) => Math.min(x / data.every, last[c])), q = p.map(Math.floor), r = p.map((x, c) => x - q[c]);
        let sum = 0;
        for (let corner = 0; corner < 8; corner++) {
          const bits = [corner & 1, (corner >> 1) & 1, corner >> 2];
          const weight = bits.reduce((w, bit, c) => w * (bit ? r[c] : 1 - r[c]), 1);
          if (!weight) continue;
          const [i, j, k] = q.map((x, c) => Math.min(x + bits[c], last[c]));
          sum += weight * channel[(k * nj + j) * ni + i];
        }
        out[b * SIZE[u] + a] = (sum / 127.5 - 1) * data.furthest;
      }
    return out;
  }

  const flipped = (u) => state.radiological && u !== 2;  // radiologists see the patient's right, and the front, on the left

  function draw(plane) {
    const canvas = canvases[plane], [, n, u, v] = PLANES[plane], nu = SIZE[u], nv = SIZE[v];
    const scale = Math.max(2, Math.round(Math.min(900, 2 * canvas.clientWidth || 600) / Math.max(...SIZE)));
    canvas.width = nu * scale, canvas.height = nv * scale;
    const context = canvas.getContext("2d");
    const x = (a) => (flipped(u) ? nu - 1 - a : a) * scale + scale / 2, y = (b) => (nv - 1 - b) * scale + scale / 2;

    const paint = (view, from) => {
      const small = document.createElement("canvas");
      small.width = nu, small.height = nv;
      small.getContext("2d").putImageData(pixels(plane, view), 0, 0);
      context.save();
      if (from) context.beginPath(), context.rect(from, 0, canvas.width - from, canvas.height), context.clip();
      context.imageSmoothingEnabled = view !== "volume change";
      context.setTransform(flipped(u) ? -1 : 1, 0, 0, -1, flipped(u) ? canvas.width : 0, canvas.height);
      context.drawImage(small, 0, 0, canvas.width, canvas.height);
      context.restore();
    };
    const shown = state.flicker && state.first ? "fixed" : state.view;
    paint(state.swipe === null ? shown : "fixed");
    if (state.swipe !== null) {
      const line = state.swipe * canvas.width;
      paint(state.view === "fixed" ? "after" : state.view, line);
      segments(context, [[line, 0, line, canvas.height]], ORANGE, 3);
    }
    if (state.folds && shown !== "volume change") folds(context, plane, x, y, scale, state.swipe === null ? 0 : state.swipe * canvas.width);
    if (shown === "grid") segments(context, gridLines(plane, x, y, scale), BLUE, Math.max(1, scale / 3));
    if (state.edges) for (const level of [0.1, 0.55])
      segments(context, contour(slice(plane)(scans.fixed[0]), nu, nv, level * 255, x, y), ORANGE, Math.max(1, scale / 3));
    if (state.labels) for (const [name, colour] of [["fixed_label", "#56B4E9"], ["warped_label", ORANGE]])
      segments(context, borders(slice(plane)(scans[name][0]), nu, nv, x, y, scale), colour, Math.max(1.5, scale / 2.5));
    if (state.landmarks) marks(context, n, u, v, x, y, scale);
    letters(context, canvas, u, v);
    ruler(context, canvas, scale);
    crosshair(context, x(state.at[u]), y(state.at[v]), canvas);
    caption(plane);
  }

  function folds(context, plane, x, y, scale, from) {  // over what is not the fixed scan's side of a swipe
    const j = slice(plane)(scans.jacobian[0]), nu = SIZE[PLANES[plane][2]];
    context.fillStyle = YELLOW_CSS;
    j.forEach((value, n) => {
      const left = x(n % nu) - scale / 2;
      if (value === 0 && left >= from) context.fillRect(left, y(Math.floor(n / nu)) - scale / 2, scale, scale);
    });
  }

  function segments(context, lines, colour, width) {
    context.strokeStyle = colour, context.lineWidth = width, context.beginPath();
    for (const [a, b, c, d] of lines) context.moveTo(a, b), context.lineTo(c, d);
    context.stroke();
  }

  function gridLines(plane, x, y, scale) {
    const [, , u, v] = PLANES[plane], nu = SIZE[u], nv = SIZE[v], step = data.spacing_of_grid;
    const du = moves(plane, u), dv = moves(plane, v), lines = [], sign = flipped(u) ? -1 : 1;
    const px = (a, b) => x(a) + sign * du[b * nu + a] * scale, py = (a, b) => y(b) - dv[b * nu + a] * scale;
    for (let a = 0; a < nu; a++) for (let b = 0; b < nv; b++) {
      if (a % step === 0 && b + 1 < nv) lines.push([px(a, b), py(a, b), px(a, b + 1), py(a, b + 1)]);
      if (b % step === 0 && a + 1 < nu) lines.push([px(a, b), py(a, b), px(a + 1, b), py(a + 1, b)]);
    }
    return lines;
  }

  function contour(values, nu, nv, level, x, y) {  // marching squares
    const lines = [];
    for (let b = 0; b + 1 < nv; b++) for (let a = 0; a + 1 < nu; a++) {
      const corners = [[a, b], [a + 1, b], [a + 1, b + 1], [a, b + 1]], found = [];
      for (let n = 0; n < 4; n++) {
        const [p, q] = [corners[n], corners[(n + 1) % 4]], f = values[p[1] * nu + p[0]], g = values[q[1] * nu + q[0]];
        if ((f > level) !== (g > level)) {
          const t = (level - f) / (g - f);
          found.push(x(p[0] + t * (q[0] - p[0])), y(p[1] + t * (q[1] - p[1])));
        }
      }
      for (let n = 0; n + 3 < found.length; n += 4) lines.push(found.slice(n, n + 4));
    }
    return lines;
  }

  function borders(values, nu, nv, x, y, scale) {  // between voxels of different labels
    const lines = [], h = scale / 2;
    for (let b = 0; b < nv; b++) for (let a = 0; a < nu; a++) {
      const here = values[b * nu + a];
      if (a + 1 < nu && values[b * nu + a + 1] !== here) {
        const middle = (x(a) + x(a + 1)) / 2;
        lines.push([middle, y(b) - h, middle, y(b) + h]);
      }
      if (b + 1 < nv && values[(b + 1) * nu + a] !== here) {
        const middle = (y(b) + y(b + 1)) / 2;
        lines.push([x(a) - h, middle, x(a) + h, middle]);
      }
    }
    return lines;
  }

  function marks(context, n, u, v, x, y, scale) {
    for (const mark of data.landmarks) {
      const away = Math.abs(mark.fixed[n] - state.at[n]) * data.mm;
      if (away > 8) continue;
      context.globalAlpha = away < 3 ? 1 : 0.45;
      const [a, b] = [x(mark.fixed[u]), y(mark.fixed[v])];
      context.strokeStyle = "#56B4E9", context.lineWidth = Math.max(2, scale / 2);
      context.beginPath(), context.arc(a, b, 1.6 * scale, 0, 7), context.stroke();
      if (mark.warped) {
        const [c, d] = [x(mark.warped[u]), y(mark.warped[v])];
        segments(context, [[a, b, c, d]], ORANGE, Math.max(2, scale / 2));
        context.fillStyle = ORANGE, context.beginPath(), context.arc(c, d, 0.8 * scale, 0, 7), context.fill();
      }
      context.globalAlpha = 1;
    }
  }

  function letters(context, canvas, u, v) {
    const size = Math.round(canvas.width / 20), [left, right] = flipped(u) ? ENDS[u].slice().reverse() : ENDS[u];
    context.font = `bold ${size}px system-ui, sans-serif`, context.textAlign = "center", context.textBaseline = "middle";
    const { width: w, height: h } = canvas;
    for (const [letter, a, b] of [[left, size * 0.7, h / 2], [right, w - size * 0.7, h / 2], [ENDS[v][0], w / 2, h - size * 0.7], [ENDS[v][1], w / 2, size * 0.7]]) {
      context.fillStyle = "#000", context.fillRect(a - size * 0.6, b - size * 0.6, size * 1.2, size * 1.2);
      context.fillStyle = ORANGE, context.fillText(letter, a, b);
    }
  }

  function ruler(context, canvas, scale) {
    const mm = [100, 50, 20, 10, 5, 2, 1].find((length) => length / data.mm < Math.min(I, J) / 3) || 1;  // the same in all planes
    const length = mm / data.mm * scale, y = canvas.height - scale * 2.5, size = Math.round(canvas.width / 26);
    segments(context, [[scale * 2, y, scale * 2 + length, y]], "#000", 6), segments(context, [[scale * 2, y, scale * 2 + length, y]], "#fff", 3);
    context.font = `${size}px system-ui, sans-serif`, context.textAlign = "left";
    context.lineWidth = 3, context.strokeStyle = "#000", context.fillStyle = "#fff";
    context.strokeText(`${mm} mm`, scale * 2, y - size * 0.8), context.fillText(`${mm} mm`, scale * 2, y - size * 0.8);
  }

  function crosshair(context, x, y, canvas) {
    const gap = canvas.height / 20, lines = [[0, y, x - gap, y], [x + gap, y, canvas.width, y], [x, 0, x, y - gap], [x, y + gap, x, canvas.height]];
    context.globalAlpha = 0.4, segments(context, lines, "#56B4E9", 1), context.globalAlpha = 1;
  }

  const times = (matrix, p) => matrix.slice(0, 3).map((row) => row[0] * p[0] + row[1] * p[1] + row[2] * p[2] + row[3]);

  function caption(plane) {
    const [name, n] = PLANES[plane], axis = data.axes[n], voxel = Math.round(times(data.to_voxel, state.at)[axis]);
    const mm = times(data.to_mm, state.at)[n], sides = ENDS[n];
    captions[plane].textContent = `${name}: slice ${"ijk"[axis]} = ${voxel} (0 to ${data.fixed_size[axis] - 1}), ${mm < 0 ? sides[0] : sides[1]} ${Math.abs(mm).toFixed(1)} mm`;
    sliders[plane].value = state.at[n];
  }

  function key() {
    const box = byId("key");
    box.textContent = "";
    const text = (words) => box.append(Object.assign(document.createElement("span"), { textContent: words }));
    const strip = (stops) => box.append(Object.assign(document.createElement("i"), { style: `background:${CSS(stops)}` }));
    if (state.view === "volume change") {
      text("yellow: folded, turned inside out"), text("volume: half"), strip(PURPLES), text("double, on a logarithmic scale; white is unchanged");
    } else if (state.view === "displacement") {
      text("0"), strip(LENGTHS), text(`${data.longest.toFixed(1)} mm, length of the displacement after the alignment`);
    } else if (state.view === "difference") {
      text("blue: darker than the fixed scan"), text("orange: brighter; white: equal (of two contrasts it is never white)");
    } else if (state.view === "grid") {
      text(`grid lines every ${(data.spacing_of_grid * data.mm).toFixed(0)} mm; where they cross over each other, it folds`);
    } else text({ fixed: "the fixed scan", before: "the moving scan, aligned by a matrix only", after: "the moving scan, warped" }[state.view]);
    if (state.folds && state.view !== "volume change") text("yellow: folded, turned inside out");
    if (state.labels) text("blue lines: labels of the fixed scan; orange: of the moving one, warped");
    if (state.edges) text("orange lines: edges of the fixed scan, which those of the picture should follow");
    if (state.landmarks) text("ring: landmark of the fixed scan; orange: where that of the moving scan came to lie");
  }

  function redraw() {
    for (const button of byId("views").children) button.setAttribute("aria-pressed", button.dataset.view === state.view);
    byId("flicker").setAttribute("aria-pressed", state.flicker), byId("swipe").setAttribute("aria-pressed", state.swipe !== null);
    byId("sides").setAttribute("aria-pressed", !state.radiological);
    for (const name of LAYERS) if (byId(name)) byId(name).checked = state[name];
    byId("convention").textContent = state.radiological ? "Radiological view: the patient's left is on the right." : "Neurological view: the patient's left is on the left.";
    document.querySelectorAll(".second").forEach((word) => (word.textContent = state.view === "fixed" ? "after" : state.view));
    document.querySelectorAll(".plane").forEach((box, n) => box.classList.toggle("active", n === state.plane));
    [0, 1, 2].forEach(draw), key();
  }

  /* ---- controls ---- */

  document.body.classList.add("scripted");
  byId("planes").style.setProperty("--across", PLANES.map(([, , u]) => `minmax(0, ${SIZE[u]}fr)`).join(" "));  // one scale
  const canvases = [], captions = [], sliders = [];
  VIEWS.forEach((view, n) => {
    const button = Object.assign(document.createElement("button"), { textContent: `${n + 1} ${view}` });
    button.dataset.view = view, button.onclick = () => show(view), byId("views").append(button);
  });
  PLANES.forEach(([name, n, u, v], plane) => {
    const box = Object.assign(document.createElement("figure"), { className: "plane" });
    const canvas = Object.assign(document.createElement("canvas"), { tabIndex: 0 });
    canvas.style.aspectRatio = `${SIZE[u]} / ${SIZE[v]}`, canvas.setAttribute("aria-label", `${name} plane`);
    const words = document.createElement("figcaption");
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: SIZE[n] - 1 });
    slider.setAttribute("aria-label", `${name} slice`);
    slider.oninput = () => { state.at[n] = +slider.value, state.plane = plane, redraw(); };
    canvas.onfocus = () => { state.plane = plane; redraw(); };
    const move = (event) => {
      const box = canvas.getBoundingClientRect(), across = (event.clientX - box.left) / box.width;
      if (state.swipe !== null) state.swipe = Math.max(0, Math.min(1, across));
      else {
        const clip = (x, size) => Math.max(0, Math.min(size - 1, Math.floor(x * size)));
        state.at[u] = clip(flipped(u) ? 1 - across : across, SIZE[u]);
        state.at[v] = clip(1 - (event.clientY - box.top) / box.height, SIZE[v]);
      }
      state.plane = plane, redraw();
    };
    canvas.onpointerdown = move;
    canvas.onpointermove = (event) => { if (event.buttons) move(event); };
    canvas.addEventListener("wheel", (event) => { if (event.ctrlKey) return; event.preventDefault(), step(plane, event.deltaY > 0 ? -1 : 1); }, { passive: false });
    box.append(canvas, words, slider), byId("planes").append(box);
    canvases.push(canvas), captions.push(words), sliders.push(slider);
  });

  function show(view) { state.view = view, redraw(); }
  function step(plane, by) {
    const n = PLANES[plane][1];
    state.at[n] = Math.max(0, Math.min(SIZE[n] - 1, state.at[n] + by)), state.plane = plane, redraw();
  }
  let clock = 0;
  function flicker() {
    state.flicker = !state.flicker, state.first = state.flicker, clearInterval(clock);
    if (state.view === "fixed") state.view = "after";
    if (state.flicker) clock = setInterval(() => { state.first = !state.first, redraw(); }, 500);
    redraw();
  }
  const swipe = () => { state.swipe = state.swipe === null ? 0.5 : null, redraw(); };
  const toggle = (name) => {
    if (!byId(name)) return;
    state[name] = !state[name];
    if (state[name] && name in OTHER) state[OTHER[name]] = false;  // both are orange
    redraw();
  };
  byId("flicker").onclick = flicker, byId("swipe").onclick = swipe;
  byId("sides").onclick = () => { state.radiological = !state.radiological, redraw(); };
  for (const name of LAYERS) if (byId(name)) byId(name).onchange = () => toggle(name);
  byId("width").oninput = (event) => { state.width = event.target.value / 100, redraw(); };
  byId("level").oninput = (event) => { state.level = event.target.value / 100, redraw(); };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.type === "range") return;
    const press = event.key.toLowerCase(), acts = {
      f: flicker, s: swipe, e: () => toggle("edges"), o: () => toggle("folds"), l: () => toggle("labels"), p: () => toggle("landmarks"), r: () => byId("sides").click(),
      arrowup: () => step(state.plane, 1), arrowdown: () => step(state.plane, -1), pageup: () => step(state.plane, 5), pagedown: () => step(state.plane, -5),
    };
    if (VIEWS[press - 1]) show(VIEWS[press - 1]); else if (acts[press]) acts[press](); else return;
    event.preventDefault();
  });
  addEventListener("resize", redraw);
  addEventListener("beforeprint", () => document.querySelectorAll(".verdict details").forEach((more) => (more.open = true)));
  redraw();
  document.body.dataset.ready = "yes";
})();

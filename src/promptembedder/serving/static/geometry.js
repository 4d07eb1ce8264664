// Vectors to what the page draws: cosines, neighbours, groups, and a map. n texts, all arrays have one entry a text.

// Cosine of every two vectors, n × n.
export function cosines(vectors) {
  const unit = vectors.map((vector) => {
    const length = Math.hypot(...vector) || 1;
    return vector.map((x) => x / length);
  });
  return unit.map((a) => unit.map((b) => a.reduce((sum, x, d) => sum + x * b[d], 0)));
}

// All other texts, nearest first.
export function neighbours(cosine, text) {
  const others = [...cosine.keys()].filter((other) => other !== text);
  return others.sort((a, b) => cosine[text][b] - cosine[text][a] || a - b);
}

const MOST_GROUPS = 6;

// Groups by average linkage; as many as give the best silhouette. `label`: group of each text, numbered by its first
// text. `order`: texts, those of a group together.
export function groups(cosine) {
  const n = cosine.length;
  const distance = cosine.map((row) => row.map((x) => 1 - x));
  let parts = [...cosine.keys()].map((text) => [text]);
  let best = { score: -Infinity, parts: [[...cosine.keys()]] };
  while (parts.length > 1) {
    if (parts.length <= Math.min(MOST_GROUPS, n - 1)) {
      const score = silhouette(parts, distance);
      // Fewer groups win where more are hardly better.
      if (score > best.score - 0.01) best = { score: Math.max(score, best.score), parts };
    }
    parts = merged(parts, distance);
  }
  const found = best.parts.map((part) => [...part]).sort((a, b) => Math.min(...a) - Math.min(...b));
  const label = new Array(n);
  found.forEach((part, group) => part.forEach((text) => { label[text] = group; }));
  return { label, order: found.flatMap((part) => part.sort((a, b) => a - b)), parts: found };
}

const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;

function merged(parts, distance) {
  let least = Infinity;
  let pair = [0, 1];
  for (let i = 0; i < parts.length; i++) {
    for (let j = i + 1; j < parts.length; j++) {
      const between = mean(parts[i].flatMap((a) => parts[j].map((b) => distance[a][b])));
      if (between < least) [least, pair] = [between, [i, j]];
    }
  }
  const rest = parts.filter((_, i) => !pair.includes(i));
  return [...rest, [...parts[pair[0]], ...parts[pair[1]]]];
}

function silhouette(parts, distance) {
  const scores = parts.flatMap((part) => part.map((text) => {
    if (part.length === 1) return 0;
    const inside = mean(part.filter((other) => other !== text).map((other) => distance[text][other]));
    const outside = Math.min(...parts.filter((other) => other !== part)
      .map((other) => mean(other.map((far) => distance[text][far]))));
    return (outside - inside) / (Math.max(inside, outside) || 1);
  }));
  return mean(scores);
}

// Places [x, y] of the first two principal components, and the share of the variance that they hold.
export function principal(vectors) {
  const n = vectors.length;
  const centre = vectors[0].map((_, d) => mean(vectors.map((vector) => vector[d])));
  const centred = vectors.map((vector) => vector.map((x, d) => x - centre[d]));
  const gram = centred.map((a) => centred.map((b) => a.reduce((sum, x, d) => sum + x * b[d], 0)));
  const { values, vectors: columns } = eigen(gram);
  const largest = [...values.keys()].sort((a, b) => values[b] - values[a]);
  const total = values.reduce((sum, x) => sum + Math.max(x, 0), 0) || 1;
  const axes = largest.slice(0, 2).map((c) => ({ scale: Math.sqrt(Math.max(values[c], 0)), c }));
  const places = [...Array(n).keys()].map((i) => axes.map(({ scale, c }) => scale * columns[i][c]));
  return { places, share: axes.reduce((sum, { scale }) => sum + scale * scale, 0) / total };
}

// Eigenvalues and eigenvectors (columns) of a symmetric matrix, by Jacobi's rotations.
function eigen(symmetric) {
  const n = symmetric.length;
  const a = symmetric.map((row) => [...row]);
  const v = a.map((_, i) => a.map((__, j) => (i === j ? 1 : 0)));
  const size = Math.hypot(...a.flat()) || 1;
  for (let sweep = 0; sweep < 60; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        off += a[p][q] ** 2;
        if (Math.abs(a[p][q]) < 1e-14 * size) continue;
        const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
        const c = 1 / Math.sqrt(t * t + 1);
        rotate(a, v, p, q, c, t * c);
      }
    }
    if (Math.sqrt(off) < 1e-10 * size) break;
  }
  return { values: a.map((row, i) => row[i]), vectors: v };
}

function rotate(a, v, p, q, c, s) {
  for (const row of a) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
  for (let k = 0; k < a.length; k++) [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
  for (const row of v) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
}

// Places turned and mirrored so that they lie as close as they can to others, which keeps all distances.
export function aligned(places, others) {
  const turned = [1, -1].map((mirror) => {
    const from = places.map(([x, y]) => [x, mirror * y]);
    let along = 0;
    let across = 0;
    from.forEach(([x, y], i) => {
      along += x * others[i][0] + y * others[i][1];
      across += x * others[i][1] - y * others[i][0];
    });
    const angle = Math.atan2(across, along);
    const [c, s] = [Math.cos(angle), Math.sin(angle)];
    return { fit: Math.hypot(along, across), places: from.map(([x, y]) => [c * x - s * y, s * x + c * y]) };
  });
  return turned[0].fit >= turned[1].fit ? turned[0].places : turned[1].places;
}

// Corners of the convex hull, in order.
export function hull(points) {
  const sorted = [...points].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  if (sorted.length < 3) return sorted;
  const left = (o, a, b) => (a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0]) <= 0;
  const half = (of) => {
    const chain = [];
    for (const point of of) {
      while (chain.length > 1 && left(chain.at(-2), chain.at(-1), point)) chain.pop();
      chain.push(point);
    }
    return chain.slice(0, -1);
  };
  return [...half(sorted), ...half(sorted.reverse())];
}

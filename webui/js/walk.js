// The walk so far as a tree of lines: chunks with small pictures, and where each branch left another. No DOM.

const MAX_PICTURES = 600;
const MAX_CHUNKS = 4096;

/**
 * Branch 0 is the session's beginning. A branch has its own chunks from where it began, and those of the branch that it
 * left before that.
 */
export class Walk {
  #lines = new Map(); // branch -> {source, at, chunks: Map of chunk -> picture or null, prompts: [{chunk, prompt}]}
  #drop;
  #pictures = 0;

  branch = 0;
  keptFrom = null; // the first chunk of the current line that the server still has; null: it keeps none

  /** `drop(picture)` runs for every picture that is not needed any more. */
  constructor(drop = () => {}) {
    this.#drop = drop;
    this.clear();
  }

  clear() {
    for (const { chunks } of this.#lines.values()) for (const picture of chunks.values()) if (picture) this.#drop(picture);
    this.#lines = new Map([[0, { source: null, at: 0, chunks: new Map(), prompts: [] }]]);
    this.#pictures = 0;
    this.branch = 0;
    this.keptFrom = null;
  }

  get branches() {
    return [...this.#lines.keys()];
  }

  /** Chunk `index` of the current line has come. */
  chunkCame(index, keptFrom) {
    this.keptFrom = keptFrom;
    const { chunks } = this.#lines.get(this.branch);
    if (!chunks.has(index)) chunks.set(index, null);
    if (chunks.size > MAX_CHUNKS) this.#remove(chunks, chunks.keys().next().value);
  }

  /** A frame of chunk `index` is shown under `prompt`; `picture()` makes a small one, if the chunk has none. */
  shown(index, prompt, picture) {
    const { chunks, prompts } = this.#lines.get(this.branch);
    if (prompts.at(-1)?.prompt !== prompt) prompts.push({ chunk: index, prompt });
    if (chunks.get(index)) return false;
    chunks.set(index, picture());
    this.#pictures++;
    if (this.#pictures > MAX_PICTURES) this.#dropOldest();
    return true;
  }

  /** The session went on just before chunk `at` as `branch`. One that is new left `source` there. */
  rewound({ branch, at, source }) {
    const line = this.#lines.get(branch);
    if (line) {
      for (const chunk of [...line.chunks.keys()]) if (chunk >= at) this.#remove(line.chunks, chunk);
      line.prompts = line.prompts.filter(({ chunk }) => chunk < at);
    } else {
      const from = this.#lines.has(source) ? source : this.branch;
      this.#lines.set(branch, { source: from, at, chunks: new Map(), prompts: [] });
    }
    this.branch = branch;
  }

  /** The session goes on in `branch`. Of one that is new the page knows nothing before that. */
  resumed(branch) {
    if (!this.#lines.has(branch)) {
      if (!this.#lines.get(this.branch).chunks.size) this.#lines.delete(this.branch);
      this.#lines.set(branch, { source: null, at: 0, chunks: new Map(), prompts: [] });
    }
    this.branch = branch;
  }

  /** The prompt in force at the end of the current line; null if that is not known. */
  get prompt() {
    let below = Infinity;
    for (let name = this.branch; name !== null; ) {
      const { source, at, prompts } = this.#lines.get(name);
      const found = prompts.findLast(({ chunk }) => chunk < below);
      if (found) return found.prompt;
      below = Math.min(below, at);
      name = source;
    }
    return null;
  }

  /** The chunks of a branch's line, oldest first: [{chunk, picture}]. Those of the current line that are kept. */
  line(branch = this.branch) {
    const found = new Map();
    let below = Infinity;
    for (let name = branch; name !== null; ) {
      const { source, at, chunks } = this.#lines.get(name);
      for (const [chunk, picture] of chunks) if (chunk < below && !found.has(chunk)) found.set(chunk, picture);
      below = Math.min(below, at);
      name = source;
    }
    const from = branch === this.branch ? (this.keptFrom ?? Infinity) : 0;
    const line = [...found].map(([chunk, picture]) => ({ chunk, picture })).filter(({ chunk }) => chunk >= from);
    return line.sort((one, other) => one.chunk - other.chunk);
  }

  #remove(chunks, chunk) {
    const picture = chunks.get(chunk);
    chunks.delete(chunk);
    if (!picture) return;
    this.#pictures--;
    this.#drop(picture);
  }

  #dropOldest() {
    for (const { chunks } of this.#lines.values())
      for (const [chunk, picture] of chunks) {
        if (!picture) continue;
        chunks.set(chunk, null);
        this.#pictures--;
        this.#drop(picture);
        return;
      }
  }
}

/** The picture of the last chunk up to `chunk` that has one, or null. */
export function pictureAt(line, chunk) {
  return line.findLast((entry) => entry.chunk <= chunk && entry.picture)?.picture ?? null;
}

/** When chunk `chunk` begins, in milliseconds since the session's first frame. */
export function startOfChunk(chunk, { num_frames: frames = 9, fps = 16 }) {
  const latent = Math.floor((frames - 1) / 4) + 1;
  return chunk === 0 ? 0 : (1000 * (4 * (latent * chunk - 1) + 1)) / fps;
}

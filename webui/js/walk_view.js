// The walk so far, below the picture: a strip of small pictures to scrub through, and the way back to one of them.

import { $, clockText, h, setText } from "./dom.js";
import { Walk, pictureAt, startOfChunk } from "./walk.js";
import { focusWorld } from "./world_focus.js";

const PICTURE_WIDTH = 112;
const EXACT_NOTE = "";
const ALIKE_NOTE = "This world is like the one you left. Some of its past was not kept.";

export class WalkView {
  #walk = new Walk();
  #onGo;
  #init = {};
  #branch = 0; // the line that is shown
  #chosen = null; // the chunk that the user looks at; null: the world as it is now
  #asked = null; // {branch} of a way back that the server has not taken yet

  /** `onGo({kind, chunk, branch})` asks the server; it returns whether that was possible. */
  constructor(onGo) {
    this.#onGo = onGo;
    const range = $("walk-at");
    range.oninput = () => this.#choose(Number(range.value));
    range.onkeydown = (event) => {
      if (event.key === "Enter") this.#go();
      if (event.key === "Escape") this.#cancel();
    };
    $("walk-go").onclick = () => this.#go();
    $("walk-cancel").onclick = () => this.#cancel();
    new ResizeObserver(() => this.#draw()).observe($("walk-strip"));
  }

  /** A session begins. `init` has its num_frames and fps. */
  start(init) {
    this.#init = init;
    this.#walk.clear();
    this.#branch = 0;
    this.#asked = null;
    setText($("walk-note"), EXACT_NOTE);
    this.#leave();
  }

  /** The session goes on in `branch` after a lost line, a reload, or from a file. */
  resumed(branch) {
    this.#walk.resumed(branch);
    this.#branch = branch;
    this.#show();
  }

  chunkCame({ chunk_index: chunk, kept_from: keptFrom = null }) {
    this.#walk.chunkCame(chunk, keptFrom);
    this.#show();
  }

  /** A frame of chunk `chunkIndex`, made under `prompt`, is on the canvas. */
  frameDrawn(chunkIndex, prompt, canvas) {
    if (this.#walk.shown(chunkIndex, prompt, () => smallPicture(canvas))) this.#draw();
  }

  /** The session went back. Returns the prompt in force there, or null. */
  rewound({ chunkIndex, branch, exact }) {
    this.#walk.rewound({ branch, at: chunkIndex, source: this.#asked?.branch ?? this.#walk.branch });
    this.#branch = branch;
    this.#asked = null;
    setText($("walk-note"), exact ? EXACT_NOTE : ALIKE_NOTE);
    this.#leave();
    return this.#walk.prompt;
  }

  /** The server refused to go back, or the session is over. */
  notGone() {
    this.#asked = null;
    this.#show();
  }

  hide() {
    this.#leave();
    $("walk").hidden = true;
  }

  get #isNow() {
    return this.#chosen === null || (this.#branch === this.#walk.branch && this.#chosen > this.#end);
  }

  get #end() {
    return this.#walk.line(this.#branch).at(-1)?.chunk ?? -1;
  }

  #choose(chunk) {
    this.#chosen = chunk;
    this.#show();
  }

  #go() {
    if (this.#isNow || this.#asked) return;
    const chunk = this.#chosen;
    const branch = this.#branch;
    // At the end of another line nothing is lost by going on there; elsewhere a new branch leaves what came after.
    const kind = chunk > this.#end ? "rewind" : "branch";
    if (!this.#onGo({ kind, chunk, branch })) return;
    this.#asked = { branch };
    focusWorld();
    this.#show();
  }

  #cancel() {
    this.#branch = this.#walk.branch;
    this.#leave();
    focusWorld();
  }

  #leave() {
    const hadFocus = $("walk").contains(document.activeElement);
    this.#chosen = null;
    this.#show();
    if (hadFocus) focusWorld();
  }

  #show() {
    const line = this.#walk.line(this.#branch);
    const { branches, keptFrom } = this.#walk;
    $("walk").hidden = keptFrom === null || (line.length < 2 && branches.length < 2);
    if ($("walk").hidden) {
      document.body.removeAttribute("data-scrubbing");
      return this.#preview(null);
    }
    const first = line[0]?.chunk ?? 0;
    const end = Math.max(this.#end + 1, first);
    const at = Math.max(Math.min(this.#chosen ?? end, end), first);
    const range = $("walk-at");
    range.min = first;
    range.max = end;
    range.value = at;
    const text = this.#isNow ? "Now" : clockText(startOfChunk(at, this.#init));
    range.setAttribute("aria-valuetext", text);
    setText($("walk-time"), text);
    $("walk-go").disabled = this.#asked !== null;
    setText($("walk-go").querySelector("span"), this.#asked ? "Going back" : "Go back to here");
    document.body.toggleAttribute("data-scrubbing", !this.#isNow);
    this.#preview(this.#isNow ? null : pictureAt(line, at));
    this.#showLines(branches);
    this.#draw();
  }

  #showLines(branches) {
    const root = $("walk-lines");
    const wanted = `${branches} ${this.#branch} ${this.#walk.branch}`;
    root.hidden = branches.length < 2;
    if (root.dataset.shown === wanted) return;
    root.dataset.shown = wanted;
    const focused = [...root.children].indexOf(document.activeElement);
    root.replaceChildren(
      ...branches.map((branch, number) =>
        h("button", {
          className: "button",
          "aria-pressed": String(branch === this.#branch),
          textContent: `Walk ${number + 1}${branch === this.#walk.branch ? ", now" : ""}`,
          onclick: () => this.#showLine(branch),
        }),
      ),
    );
    root.children[focused]?.focus();
  }

  /** Another line is shown at its end, from where it can go on. */
  #showLine(branch) {
    this.#branch = branch;
    this.#chosen = branch === this.#walk.branch ? null : this.#end + 1;
    this.#show();
  }

  #preview(picture) {
    const canvas = $("walk-preview");
    canvas.hidden = picture === null;
    if (picture) drawAll(canvas, picture);
  }

  /** As many pictures as fit beside each other, evenly over the line. */
  #draw() {
    const canvas = $("walk-strip");
    const line = this.#walk.line(this.#branch);
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!width || !line.length) return;
    const scale = Math.min(devicePixelRatio, 2);
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const first = line.find(({ picture }) => picture)?.picture;
    if (!first) return;
    const context = canvas.getContext("2d");
    const count = Math.max(1, Math.min(Math.round((width * first.height) / (height * first.width)), line.length));
    const step = canvas.width / count;
    for (let i = 0; i < count; i++) {
      const picture = pictureAt(line, line[Math.floor(((i + 0.5) / count) * line.length)].chunk);
      if (picture) drawCover(context, picture, { x: i * step, width: step, height: canvas.height });
    }
  }
}

function smallPicture(canvas) {
  const picture = document.createElement("canvas");
  picture.width = PICTURE_WIDTH;
  picture.height = Math.round((PICTURE_WIDTH * canvas.height) / canvas.width);
  picture.getContext("2d").drawImage(canvas, 0, 0, picture.width, picture.height);
  return picture;
}

function drawAll(canvas, picture) {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").drawImage(picture, 0, 0);
}

/** The middle of the picture, as much as fills the box. */
function drawCover(context, picture, { x, width, height }) {
  const scale = Math.max(width / picture.width, height / picture.height);
  const [wide, high] = [width / scale, height / scale];
  context.drawImage(picture, (picture.width - wide) / 2, (picture.height - high) / 2, wide, high, x, 0, width, height);
}

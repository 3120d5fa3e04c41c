// A world that is kept: it comes back after a lost line and after a reload, goes back, is saved and opened.

import { $, download, timestamp } from "./dom.js";
import { forgetTicket, keepTicket, takeTicket } from "./ticket.js";
import { WalkView } from "./walk_view.js";
import { WorldFileError, readWorldFile } from "./world_file.js";

const PICTURE_QUALITY = 0.7;

export class KeptWorld {
  #player;
  #errors;
  #canvas;
  #getBase;
  #onOpen;
  #ticket = null;
  #prompt = ""; // of the frame that was drawn last
  #isKept = false;
  #isSaving = false;
  #view;

  /**
   * `getBase()` is the server's address. `onOpen({bytes, init, firstFrame})` gets a file that the user chose, and
   * `onStop()` runs when the user does not want to wait for a lost line any more.
   */
  constructor({ player, errors, canvas, getBase, onOpen, onStop }) {
    this.#player = player;
    this.#errors = errors;
    this.#canvas = canvas;
    this.#getBase = getBase;
    this.#onOpen = onOpen;
    this.#view = new WalkView((place) => this.#goBack(place));
    $("save-world").onclick = () => this.#save();
    $("open-world").onchange = ({ target }) => {
      if (target.files[0]) void this.#open(target.files[0]);
      target.value = "";
    };
    $("leave-away").onclick = onStop;
    addEventListener("online", () => player.hurry());
    document.addEventListener("visibilitychange", () => document.hidden || player.hurry());
    addEventListener("pagehide", () => this.#pageLeaves());
  }

  /** A session starts anew, or goes on after a reload, with `init`. */
  start(init) {
    this.#isKept = this.#isSaving = false;
    this.#prompt = "";
    this.#view.start(init);
    this.#show();
  }

  /** The ticket of this page before it was loaded again, or null. */
  takeTicket() {
    return takeTicket(this.#getBase(), Date.now());
  }

  /** Shows the last picture before the reload. */
  async showPicture({ picture }) {
    if (!picture) return;
    const bytes = Uint8Array.from(atob(picture.split(",")[1]), (char) => char.charCodeAt(0));
    const image = await createImageBitmap(new Blob([bytes]));
    if (this.#player.hasDrawn) return;
    this.#canvas.width = image.width;
    this.#canvas.height = image.height;
    this.#canvas.getContext("2d").drawImage(image, 0, 0);
  }

  opened({ token, resumeMs, init, isResumed, branch }) {
    if (isResumed) this.#view.resumed(branch);
    this.#ticket = token === null ? null : { base: this.#getBase(), token, resumeMs, init };
    if (this.#ticket) keepTicket(this.#ticket);
    else forgetTicket();
  }

  frameDrawn(frame, prompt) {
    this.#prompt = prompt;
    this.#view.frameDrawn(frame.chunkIndex, prompt, this.#canvas);
  }

  chunkCame(stats) {
    this.#isKept = (stats.kept_from ?? null) !== null;
    this.#view.chunkCame(stats);
    this.#show();
  }

  /** Returns the prompt in force where the session went back to, or null. */
  rewound(place) {
    return this.#view.rewound(place);
  }

  /** The server does not do `event`. */
  notDone(event) {
    if (event?.kind === "save") this.#saved();
    else if (event?.kind === "rewind" || event?.kind === "branch") this.#view.notGone();
  }

  worldCame(bytes) {
    this.#saved();
    download(new Blob([bytes], { type: "application/octet-stream" }), `world-${timestamp()}.safetensors`);
  }

  /** The line is lost or back. */
  showAway(isAway) {
    $("away").hidden = !isAway;
  }

  ended() {
    this.#ticket = null;
    forgetTicket();
    this.#isKept = false;
    this.#saved();
    this.#view.hide();
  }

  #goBack({ kind, chunk, branch }) {
    if (this.#player.request(kind, { chunk, branch }) === null) return false;
    if (this.#player.isPaused) this.#player.pause(false);
    return true;
  }

  #save() {
    if (this.#isSaving || this.#player.request("save") === null) return;
    this.#isSaving = true;
    this.#show();
  }

  #saved() {
    this.#isSaving = false;
    this.#show();
  }

  #show() {
    const button = $("save-world");
    button.disabled = !this.#isKept || this.#isSaving;
    button.setAttribute("aria-busy", String(this.#isSaving));
    button.querySelector("span").textContent = this.#isSaving ? "Saving" : "Save this world";
  }

  async #open(file) {
    try {
      await this.#onOpen(await readWorldFile(file));
    } catch (error) {
      if (!(error instanceof WorldFileError)) throw error;
      const advice = "Choose a file that “Save this world” or lingbot-rt client --save wrote.";
      this.#errors.show({ key: "world", title: "This world cannot be opened", detail: error.message, advice });
    }
  }

  #pageLeaves() {
    if (!this.#ticket || !this.#player.isRunning) return;
    const picture = this.#player.hasDrawn ? this.#canvas.toDataURL("image/jpeg", PICTURE_QUALITY) : null;
    const init = { ...this.#ticket.init, prompt: this.#prompt || this.#ticket.init.prompt };
    keepTicket({ ...this.#ticket, init, leftAt: Date.now(), picture });
  }
}

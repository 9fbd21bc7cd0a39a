// The webcam: one at a time, whoever asked last has it.

import { Unusable, jpeg } from "./photos.js";

let current = null;

export class Camera {
  on = false;
  #stream = null;

  constructor(video, stopped) {
    this.video = video;
    this.stopped = stopped;
  }

  async start() {
    current?.stop();
    if (!navigator.mediaDevices) {
      throw new Unusable("Browsers give the camera only to localhost and to https addresses; choose photos instead.");
    }
    current = this;
    this.on = true;
    try {
      const wanted = { facingMode: "environment", width: { ideal: 1280 }, height: { ideal: 960 } };
      this.#stream = await navigator.mediaDevices.getUserMedia({ video: wanted });
      if (!this.on) return this.#release(); // closed while the browser was asking
      const [track] = this.#stream.getVideoTracks();
      this.video.classList.toggle("mirror", track.getSettings().facingMode !== "environment");
      this.video.srcObject = this.#stream;
      await this.video.play();
    } catch (error) {
      this.stop();
      throw new Unusable(why(error));
    }
  }

  frame() {
    return jpeg(this.video, this.video.videoWidth, this.video.videoHeight);
  }

  stop() {
    if (!this.on) return;
    this.on = false;
    if (current === this) current = null;
    this.#release();
    this.stopped();
  }

  #release() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = null;
    this.video.srcObject = null;
  }
}

function why({ name, message }) {
  if (name === "NotAllowedError") return "The camera was not allowed; the browser's address bar has the switch.";
  if (name === "NotFoundError") return "No camera was found.";
  if (name === "NotReadableError") return "The camera is used by another program.";
  return `The camera does not start: ${message}`;
}

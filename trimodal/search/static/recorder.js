// Recording by the browser's own recorder, in whatever format it makes.

/** Why this browser cannot record here: the name of a text of words.js, "" where it can. */
export function obstacle() {
  if (!window.isSecureContext) return "insecure";
  return navigator.mediaDevices?.getUserMedia && window.MediaRecorder ? "" : "noRecorder";
}

/** Record until `stop` of the result is called, `maxS` seconds at most.

 * `onTick(seconds)` is called about once a second, `onEnd(file)` with what was recorded (null: it was cancelled). */
export async function record(maxS, onTick, onEnd) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const parts = [];
  let isCancelled = false;
  const begun = performance.now();
  const timer = setInterval(() => {
    const seconds = (performance.now() - begun) / 1000;
    onTick(seconds);
    if (seconds >= maxS && recorder.state === "recording") recorder.stop();
  }, 250);
  recorder.ondataavailable = (event) => event.data.size && parts.push(event.data);
  recorder.onstop = () => {
    clearInterval(timer);
    for (const track of stream.getTracks()) track.stop();
    onEnd(isCancelled ? null : new Blob(parts, { type: recorder.mimeType }));
  };
  recorder.start();
  onTick(0);
  return {
    stop: () => recorder.state === "recording" && recorder.stop(),
    cancel: () => { isCancelled = true; if (recorder.state === "recording") recorder.stop(); },
  };
}

/** The text of words.js for what getUserMedia refuses. */
export function reasonOf(error) {
  return error.name === "NotAllowedError" || error.name === "SecurityError" ? "noPermission" : "noMicrophone";
}

// Answers are computed in this browser: by ONNX Runtime, single-threaded, from the file model.onnx.

const MOST_PIXELS = 4e6; // larger images are made smaller before: a phone has little memory
const LOCAL = "A browser opens no network from a page on the disk. Serve this folder, for example by: python -m http.server -d FOLDER";

async function open() {
  const ort = await import(FACTS.runtime);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = {wasm: new URL(FACTS.wasm, document.baseURI).href};
  return {ort, session: await ort.InferenceSession.create("model.onnx", {executionProviders: ["wasm"]})};
}

const local = location.protocol === "file:";
const opened = local ? Promise.reject(new Error(LOCAL)) : open();
opened.catch((error) => tell(error.message, true));

async function pixelsOf(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {imageOrientation: "from-image", colorSpaceConversion: "none"});
  } catch {
    throw new Error("This browser cannot read the file as an image.");
  }
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * bitmap.width));
  canvas.height = Math.max(1, Math.round(scale * bitmap.height));
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // transparent images are laid on white, as in training
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const {data} = context.getImageData(0, 0, canvas.width, canvas.height), count = data.length / 4;
  const pixels = new Uint8Array(count * FACTS.channels);
  for (let k = 0; k < count; k++) {
    const red = data[4 * k], green = data[4 * k + 1], blue = data[4 * k + 2];
    if (FACTS.channels === 1) {
      pixels[k] = Math.round(0.299 * red + 0.587 * green + 0.114 * blue);
    } else {
      pixels.set([red, green, blue], 3 * k);
    }
  }
  return {pixels, shape: [1, canvas.height, canvas.width, FACTS.channels]};
}

async function classify(file) {
  const {ort, session} = await opened, {pixels, shape} = await pixelsOf(file);
  const {probabilities} = await session.run({images: new ort.Tensor("uint8", pixels, shape)});
  const ranked = FACTS.classes.map((name, number) => ({class: name, probability: probabilities.data[number]}));
  return ranked.sort((one, other) => other.probability - one.probability).slice(0, 5);
}

async function lookInto() {} // only the service explains

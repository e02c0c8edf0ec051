// Answers are computed in this browser: by ONNX Runtime, single-threaded, from the file model.onnx.

const MOST_PIXELS = 4e6; // larger images are made smaller before: a phone has little memory
const SIDE = 256; // of an overlay in pixels, at least
const LOCAL = "A browser opens no network from a page on the disk. Serve this folder, for example by: python -m http.server -d FOLDER";

async function open() {
  const ort = await import(FACTS.runtime);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = {wasm: new URL(FACTS.wasm, document.baseURI).href};
  return {ort, session: await ort.InferenceSession.create("model.onnx", {executionProviders: ["wasm"]})};
}

const looked = new WeakMap(); // by file: its pixels, and where the tokens look
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
  return {canvas, pixels, shape: [1, canvas.height, canvas.width, FACTS.channels]};
}

async function classify(file) {
  const {ort, session} = await opened, {canvas, pixels, shape} = await pixelsOf(file);
  const {probabilities, attention} = await session.run({images: new ort.Tensor("uint8", pixels, shape)});
  looked.set(file, {canvas, attention});
  const ranked = FACTS.classes.map((name, number) => ({class: name, probability: probabilities.data[number]}));
  return ranked.sort((one, other) => other.probability - one.probability).slice(0, 5);
}

// The part of the image that the network is shown, large enough to be looked at.
function shownPart(image) {
  const [height, width] = FACTS.size, [frameHeight, frameWidth] = FACTS.frame;
  const scale = Math.max(frameHeight / image.height, frameWidth / image.width), larger = Math.max(1, SIDE / Math.max(height, width));
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d", {willReadFrequently: true});
  [canvas.width, canvas.height] = [Math.round(larger * width), Math.round(larger * height)];
  const across = width / scale, down = height / scale;
  context.imageSmoothingQuality = "high";
  context.drawImage(image, (image.width - across) / 2, (image.height - down) / 2, across, down, 0, 0, canvas.width, canvas.height);
  return {canvas, context};
}

function colour(share) { // red, green, blue
  const place = share * (FACTS.colours.length - 1), below = Math.floor(place), above = Math.min(below + 1, FACTS.colours.length - 1);
  return FACTS.colours[below].map((one, channel) => one + (place - below) * (FACTS.colours[above][channel] - one));
}

// An image under colours from dark (the patch that counts least) to yellow, as a PNG.
function overlay(image, weights, rows, columns) {
  const {canvas, context} = shownPart(image), {width, height} = canvas, picture = context.getImageData(0, 0, width, height);
  const least = Math.min(...weights), span = Math.max(Math.max(...weights) - least, 1e-12);
  const near = (place, count) => { // the two patches around a place, and how close to the second it is
    const inside = Math.min(Math.max(place * count - 0.5, 0), count - 1), first = Math.floor(inside);
    return [first, Math.min(first + 1, count - 1), inside - first];
  };
  for (let y = 0; y < height; y++) {
    const [top, bottom, down] = near((y + 0.5) / height, rows);
    for (let x = 0; x < width; x++) {
      const [left, right, across] = near((x + 0.5) / width, columns);
      const mixed = (row) => (1 - across) * weights[row * columns + left] + across * weights[row * columns + right];
      const tint = colour(((1 - down) * mixed(top) + down * mixed(bottom) - least) / span), k = 4 * (y * width + x);
      for (let channel = 0; channel < 3; channel++) picture.data[k + channel] = 0.45 * picture.data[k + channel] + 0.55 * tint[channel];
    }
  }
  context.putImageData(picture, 0, 0);
  return canvas.toDataURL();
}

async function lookInto(file, current) {
  const {canvas, attention} = looked.get(file);
  if (!attention || !current()) return;
  const [, , rows, columns] = attention.dims, count = rows * columns;
  showPictures("tokens", FACTS.tokens.map((token, number) => ({
    source: overlay(canvas, attention.data.slice(number * count, (number + 1) * count), rows, columns),
    lines: [token],
  })));
}

// The page: an image is chosen, dropped, pasted or taken; `classify` and `lookInto` come from the script before this one.

const the = (id) => document.getElementById(id);
let latest = 0, camera = null, address = null, shown = [];

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function tell(text, bad = false) {
  the("status").textContent = text;
  the("status").classList.toggle("bad", bad);
}

function element(kind, text = "", name = "") {
  const made = document.createElement(kind);
  made.textContent = text; // never as markup: classes and files may be called anything
  made.className = name;
  return made;
}

function showAnswer(predictions) {
  const sure = 100 * predictions[0].probability >= the("least").value;
  shown = predictions;
  the("answer").textContent = sure ? predictions[0].class : "none of these";
  the("below").textContent = `${the("least").value} %`;
  the("bars").replaceChildren(...predictions.map((one) => {
    const row = element("div", "", "row"), track = element("div"), bar = element("i");
    bar.style.width = `${100 * one.probability}%`;
    track.append(bar);
    row.append(element("span", one.class), element("span", percent(one.probability)), track);
    return row;
  }));
}

function showPictures(id, pictures) {
  the(id).querySelector(".pictures").replaceChildren(...pictures.map(({source, lines}) => {
    const figure = element("figure"), image = element("img"), caption = element("figcaption");
    image.alt = lines[0];
    image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 64);
    image.src = source;
    lines.forEach((line, number) => caption.append(...(number ? [element("br")] : []), element(number ? "span" : "b", line)));
    figure.append(image, caption);
    return figure;
  }));
  the(id).hidden = pictures.length === 0;
}

async function show(file) {
  if (!file) return;
  const turn = ++latest;
  const current = () => turn === latest; // another image may have been chosen meanwhile
  closeCamera();
  for (const id of ["result", "tokens", "patches", "nearest"]) the(id).hidden = true;
  tell("Classifying …");
  try {
    const found = await classify(file);
    if (!current()) return;
    if (address) URL.revokeObjectURL(address);
    address = URL.createObjectURL(file);
    the("picture").onload = () => the("picture").classList.toggle("tiny", the("picture").naturalWidth <= 64);
    the("picture").src = address;
    showAnswer(found);
    the("result").hidden = false;
    tell("");
    await lookInto(file, current);
  } catch (error) {
    if (current()) tell(error.message, true);
  }
}

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) return the("phone").click(); // browsers give it to https and to this machine only
  try {
    camera = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
    the("video").srcObject = camera;
    the("shooting").hidden = false;
    tell("");
  } catch (error) {
    tell(`The camera cannot be used: ${error.message}`, true);
  }
}

function closeCamera() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  the("shooting").hidden = true;
}

function takePicture() {
  const video = the("video"), canvas = document.createElement("canvas");
  if (!video.videoWidth) return tell("The camera has not started yet.", true);
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => show(new File([blob], "camera.jpg", {type: blob.type})), "image/jpeg", 0.95);
}

const imageIn = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/") || !file.type);

for (const id of ["file", "phone"]) {
  the(id).addEventListener("change", ({target}) => {
    show(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
}
the("least").addEventListener("input", () => showAnswer(shown));
the("camera").addEventListener("click", openCamera);
the("shoot").addEventListener("click", takePicture);
the("stop").addEventListener("click", closeCamera);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  the("drop").classList.add("over");
});
document.addEventListener("dragleave", () => the("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  the("drop").classList.remove("over");
  const file = imageIn(event.dataTransfer);
  file ? show(file) : tell("That is not an image file.", true);
});
document.addEventListener("paste", (event) => show(imageIn(event.clipboardData)));

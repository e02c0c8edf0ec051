// Answers come from the server that this page comes from.

async function ask(path, file = null) {
  const request = {};
  if (file) {
    if (file.size > FACTS.max_bytes) throw new Error(`The file is larger than ${Math.floor(FACTS.max_bytes / 1e6)} MB.`);
    request.method = "POST";
    request.body = new FormData();
    request.body.append("image", file);
  }
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw new Error("The server does not answer.");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(typeof body.detail === "string" ? body.detail : `The server answers ${response.status}.`);
  return body;
}

const classify = async (file) => (await ask("predict", file))[0].predictions;

async function nearest(file, current) {
  // the image is sent once, when there is something to compare it with
  while ((await ask("healthz")).nearest === "loading") {
    await new Promise((wake) => setTimeout(wake, 2000));
    if (!current()) return;
  }
  const {images} = await ask("nearest", file);
  if (!current()) return;
  const lines = (one) => [one.class ?? "no label", `cosine ${one.cosine.toFixed(2)}`];
  showPictures("nearest", images.map((one) => ({source: one.picture, lines: lines(one)})));
}

async function explain(file, current, withTeacher = false) {
  tell(withTeacher ? "Asking the teacher …" : "Explaining …");
  const {answers, attributions} = await ask(`explain?teacher=${withTeacher}`, file);
  if (!current()) return;
  const maps = (kind) => attributions.filter((one) => one.title.endsWith(kind)).map((one) => ({
    source: one.overlay,
    lines: [one.title.split(":")[0], `“${one.class}”`, one.verdict],
  }));
  showPictures("tokens", maps(": attention"));
  showPictures("patches", maps(": gradients"));
  const {teacher} = answers;
  the("taught").textContent = teacher ? `The teacher says “${teacher.class}”, ${percent(teacher.probability)}.` : "";
  the("teacher").hidden = !FACTS.teacher || withTeacher;
  the("teacher").onclick = () => {
    the("teacher").hidden = true;
    explain(file, current, true).catch((error) => {
      if (!current()) return;
      the("teacher").hidden = false;
      tell(error.message, true);
    });
  };
  tell("");
}

async function lookInto(file, current) {
  await Promise.all([nearest(file, current), explain(file, current)]);
}

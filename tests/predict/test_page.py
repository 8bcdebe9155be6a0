"""The page: what stands behind its buttons, its server over HTTP, and all of it in a real browser."""
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from fsar.engine import evaluation
from fsar.predict import page
from fsar.cli.main import main
from fsar.core.basics import FsarError, torch_seed
from fsar.predict.pretrained import Preprocessing, Pretrained
from fsar.model.registry import create_model
from fsar.data.motions import render
from fsar.predict.page import Desk, Limits, check_upload
from fsar.predict.answers import Prediction
from fsar.predict.recognizer import FewShotRecognizer, Support
from fsar.data.video import decode_all, seconds_of, write_video

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MAX_MB, MAX_SECONDS = 1, 4


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    "Three clips each of three motions and one to ask about, a text file, a file that is too large and one that is too long."
    folder = tmp_path_factory.mktemp("clips")
    for name in ("split", "merge", "roll_left"):
        for k in range(4): write_video(folder / f"{name}_{k}.mp4", render(name, k), fps=12)
    (folder / "notes.txt").write_text("groceries: milk, bread\n" * 40)
    (folder / "notes.mp4").write_text("groceries: milk, bread\n" * 40)
    (folder / "enormous.mp4").write_bytes((folder / "split_0.mp4").read_bytes() + bytes(2 * MAX_MB << 20))
    write_video(folder / "long.mp4", np.repeat(render("split", 0), 5, 0), fps=12)
    return folder


@pytest.fixture(scope="module")
def recognizer() -> FewShotRecognizer: return FewShotRecognizer.from_pretrained("molo-motions-mini", device="cpu")


@pytest.fixture(scope="module")
def desk(recognizer) -> Desk: return Desk(recognizer, Limits(MAX_MB, MAX_SECONDS))


@pytest.fixture(scope="module")
def known(desk, clips) -> Support:
    "Three classes by three clips each."
    support = Support()
    for name in ("split", "merge", "roll_left"): support = desk.learn(support, name, [clips / f"{name}_{k}.mp4" for k in range(3)])
    return support


# Behind the buttons

@pytest.mark.parametrize("name", ["split", "merge", "roll_left"])
def test_the_right_label(desk, known, clips, name):
    answer = desk.ask(known, clips / f"{name}_3.mp4")
    assert answer.label == name and answer.video == f"{name}_3.mp4"


@pytest.mark.parametrize("file, why", [("notes.txt", "not a readable video"), ("notes.mp4", "not a readable video"), ("enormous.mp4", "too large: 2"), ("long.mp4", "too long: "), ("gone.mp4", "choose it again")])
def test_refused_by_name_and_without_folders(desk, known, clips, file, why):
    for call in (lambda: desk.ask(known, clips / file), lambda: desk.learn(known, "wave", [clips / "split_3.mp4", clips / file])):
        with pytest.raises(FsarError) as e: call()
        assert str(e.value).startswith(f"{file}: ") and why in str(e.value) and str(clips) not in str(e.value)


def test_the_frames_that_a_sampler_picked(known, clips):
    "VIM chooses 4 of 8 frames for this task: as its own `adapt` does, drawn as the others are not, and told in words."
    with torch_seed(0): model = create_model("vim", backbone="resnet_micro", frames=4)
    own = Desk(FewShotRecognizer(Pretrained(model, Preprocessing(short_side=72, size=64)), "cpu"))
    support = Support()
    for name in ("split", "merge"): support = own.learn(support, name, [clips / f"{name}_{k}.mp4" for k in range(2)])
    answer = own.ask(support, clips / "split_3.mp4")
    query, nearest = answer.chosen
    assert all(len(p) == 4 and p == sorted(set(p)) and set(p) <= set(range(8)) for p in answer.chosen)
    with evaluation.testing(model): _, adapted = model.adapt(support.embedding, torch.tensor([0, 0, 1, 1]), model.embed(answer.pictures[0][None]))
    assert adapted["chosen"][0].argmax(-1).tolist() == query
    faint, plain = page.strip_of(answer.pictures[0], query), page.strip_of(answer.pictures[0])
    side = answer.pictures[0].shape[-1]
    pitch = side + (plain.shape[1] - 8 * side) // 7  # with the gap between two frames
    for k in range(8):
        middle = np.s_[8:-8, k * pitch + 8:k * pitch + side - 8]
        assert np.array_equal(faint[middle], plain[middle]) == (k in query)
    said = page.answer_html(answer)
    assert all(f"The sampler picked frames {', '.join(str(k + 1) for k in picked)} of 8" in said for picked in (query, nearest))


def test_visitors_do_not_see_one_another(desk, known, clips):
    other = desk.learn(Support(), "mine", [clips / "split_0.mp4"])
    assert list(other.counts) == ["mine"] and list(known.counts) == ["split", "merge", "roll_left"] and not desk.recognizer.classes


def turned(source: Path, target: Path) -> Path:
    "The same MP4, its track header asking players for a quarter turn clockwise, as phones write it."
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    assert struct.unpack(">9i", data[at:at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    data[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def test_a_phone_held_upright(desk, clips, tmp_path):
    "Stored lying, shown upright: a clip turned back before storing, with the turn in its header, is the clip itself."
    frames = render("roll_left", 3)
    lying = write_video(tmp_path / "lying.mp4", np.ascontiguousarray(np.rot90(frames, 1, (1, 2))), fps=12)  # counter-clockwise
    upright = turned(lying, tmp_path / "phone.mp4")
    seen, info = decode_all(upright)
    assert info.rotation == 90 and np.abs(seen.astype(int) - frames).mean() < 5
    assert np.abs(decode_all(lying)[0].astype(int) - frames).mean() > 5
    def ask(path: Path) -> Prediction: return desk.ask(desk.learn(Support(), "roll_left", [clips / "roll_left_0.mp4"]), path)
    plain, phone = ask(clips / "roll_left_3.mp4"), ask(upright)
    assert np.abs(plain.similarity - phone.similarity).max() < 0.05 < np.abs(plain.similarity - ask(lying).similarity).max()


def test_hevc(desk, known, clips, tmp_path):
    try: av.codec.Codec("libx265", "w"), av.codec.Codec("hevc", "r")
    except av.codec.codec.UnknownCodecError: pytest.skip("this PyAV has no HEVC encoder and decoder")
    path = tmp_path / "phone.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=Fraction(12), options={"x265-params": "log-level=none:pools=1"})
        stream.height, stream.width, stream.pix_fmt = *render("merge", 3).shape[1:3], "yuv420p"
        for frame in render("merge", 3): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert desk.ask(known, path).label == "merge"


@pytest.mark.parametrize("fps, copies", [(12, 1), (30, 3)])
def test_length(clips, tmp_path, fps, copies):
    frames = np.repeat(render("split", 0), copies, 0)
    assert seconds_of(write_video(tmp_path / "v.mp4", frames, fps=fps)) == pytest.approx(len(frames) / fps, abs=0.02)
    check_upload(tmp_path / "v.mp4", Limits(seconds=len(frames) / fps + 0.1))
    with pytest.raises(FsarError, match="too long"): check_upload(tmp_path / "v.mp4", Limits(seconds=len(frames) / fps - 0.1))


def test_without_gradio():
    code = "import sys; sys.modules['gradio'] = None\nfrom fsar.predict.page import serve\nfrom fsar.core.basics import FsarError\ntry: serve()\nexcept FsarError as e: print(e)"
    assert "pip install 'fsar[web]'" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# Over HTTP

@pytest.fixture(scope="module")
def site(recognizer):
    "A page that is served: its address, and the folder where its uploads lie."
    pytest.importorskip("gradio", reason="the page needs gradio (pip install 'fsar[web]'), which the development tools do not bring")
    with page.serving(recognizer, max_mb=MAX_MB, max_seconds=MAX_SECONDS) as url:
        room = Path(os.environ["GRADIO_TEMP_DIR"])
        yield url, room
        assert list(room.rglob("*.mp4"))
    assert not room.exists()


def status(request) -> tuple[int, bytes]:
    "What a server answers."
    try:
        with urllib.request.urlopen(request) as answer: return answer.status, answer.read()
    except urllib.error.HTTPError as e: return e.code, e.read()


def post(url: str, name: str, content: bytes) -> tuple[int, bytes]:
    "Upload a file under a name of one's choice, past all that a browser would do to it."
    edge = uuid.uuid4().hex
    body = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: video/mp4\r\n\r\n'.encode() + content + f"\r\n--{edge}--\r\n".encode()
    return status(urllib.request.Request(f"{url}gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={edge}"}))


@pytest.mark.parametrize("name", ["../../evil.mp4", "../" * 12 + "tmp/evil.mp4", "/tmp/evil.mp4", "..\\\\..\\\\evil.mp4", "%2e%2e%2fevil.mp4", ".."])
def test_no_name_leads_out_of_the_folder(site, clips, name):
    url, room = site
    def around() -> set[Path]: return {p for folder in (room.parent, Path.cwd()) for p in folder.glob("*evil*")}
    before = around()
    code, answer = post(url, name, (clips / "split_0.mp4").read_bytes())
    assert around() == before
    if code == 200:
        for path in json.loads(answer): assert Path(path).resolve().is_relative_to(room.resolve()) and Path(path).is_file()
    else: assert code in (400, 422, 500), (code, answer)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../../../etc/passwd", str(Path(page.__file__)), str(Path.cwd() / "settings.ini"), "{room}/../../etc/passwd", "file:///etc/passwd"])
def test_no_file_of_the_server_is_given_away(site, path):
    url, room = site
    code, body = status(f"{url}gradio_api/file={urllib.parse.quote(path.format(room=room))}")
    assert code in (400, 403, 404) and b"root:" not in body and b"import" not in body


def test_an_enormous_upload_is_cut_off(site, clips):
    url, room = site
    code, answer = post(url, "enormous.mp4", (clips / "enormous.mp4").read_bytes())
    assert code == 413 and not list(room.rglob("enormous*"))


def test_only_loopback(site):
    host = urllib.parse.urlsplit(site[0]).hostname
    assert page.is_loopback(host) and page.warning(host) == "" and "password" in page.warning("0.0.0.0")


def test_a_path_of_the_server_is_no_upload(site):
    "A request that names a file instead of uploading it: refused before any of our functions sees it."
    url, _ = site
    config = json.loads(status(f"{url}config")[1])
    ask = next(d for d in config["dependencies"] if len(d["inputs"]) == 2 and len(d["outputs"]) == 1)
    session, file = uuid.uuid4().hex, {"path": str(Path(page.__file__)), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [None, file], "fn_index": ask["id"], "session_hash": session}).encode()
    assert status(urllib.request.Request(f"{url}gradio_api/queue/join", body, {"Content-Type": "application/json"}))[0] == 200
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=30) as events:
        done = next(json.loads(line[5:]) for line in events if b"process_completed" in line)
    assert done["success"] is False and page.__file__ not in json.dumps(done["output"])


# In a browser

@pytest.fixture(scope="module")
def browser(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by Playwright, which the development tools do not bring")
    if not CHROMIUM: pytest.skip("the page is driven in Chromium, which is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, site, tmp_path):
    "Opens the page in a window of some kind; afterwards nothing but loopback may have been asked for. Pictures go to $FSAR_SCREENSHOTS, or nowhere that stays."
    asked, faults, contexts = [], [], []
    shots = Path(os.environ.get("FSAR_SCREENSHOTS") or tmp_path)

    def go(**window):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "permissions": ["camera", "microphone"]} | window)
        contexts.append(context)
        context.route("**/*", lambda route: (asked.append(route.request.url), route.continue_()))
        window = context.new_page()
        window.on("pageerror", lambda e: faults.append(str(e)))
        window.set_default_timeout(30_000)
        window.goto(site[0])
        window.get_by_role("button", name="Recognise").wait_for()
        window.shot = lambda name: window.screenshot(path=shots / f"{name}.png", full_page=True)
        return window

    yield go
    for context in contexts: context.close()
    hosts = {urllib.parse.urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts and all(map(page.is_loopback, hosts)), hosts
    assert not faults


ANSWER, SAID = "#fsar-answer", "#fsar-said"


def says(window, place, text): window.locator(place).get_by_text(text).first.wait_for()


def teach(window, name, files):
    "Fill in a class and press Learn."
    window.get_by_label("Name of the class").fill(name)
    window.locator("#fsar-files input[type=file]").set_input_files(files)
    window.locator("#fsar-files").get_by_text(Path(files[-1]).stem).first.wait_for()
    window.get_by_role("button", name="Learn", exact=True).click()


def query(window, file):
    "Choose another video to recognise."
    box = window.locator("#fsar-query")
    if box.get_by_label("Clear").count(): box.get_by_label("Clear").first.click()
    box.locator("input[type=file]").set_input_files(file)


def test_first_click(visit):
    window = visit()
    window.get_by_role("button", name="Recognise").click()
    says(window, ANSWER, page.EXAMPLE[0])
    window.shot("first")
    texts = window.locator(f"{ANSWER} img").evaluate_all("found => found.map(i => [i.alt, i.naturalWidth])")
    assert len(texts) == 3 and all(alt and width > 100 for alt, width in texts)
    assert window.title().startswith("fsar") and window.locator("html").get_attribute("lang")


def test_own_examples(visit, clips):
    window = visit()
    window.get_by_role("button", name="Forget all").click()
    says(window, "#fsar-table", "No class is known yet")
    for name in ("split", "merge", "roll_left"):
        teach(window, name, [clips / f"{name}_{k}.mp4" for k in range(3)])
        says(window, SAID, f"Learned '{name}' from 3 videos")
    query(window, clips / "merge_3.mp4")
    window.locator("#fsar-query video").wait_for()
    window.get_by_role("button", name="Recognise").click()
    says(window, ".fsar-verdict", "merge")
    window.shot("own")
    assert window.locator(".fsar-verdict strong").inner_text() == "merge" and "merge_3.mp4" in window.locator(".fsar-verdict").inner_text()
    teach(window, "merge", [clips / "merge_3.mp4"])
    says(window, SAID, "known already")
    teach(window, "", [clips / "merge_3.mp4"])
    says(window, SAID, "has no name")


def test_refusals(visit, clips):
    window = visit()
    teach(window, "wave", [clips / "notes.mp4"])
    says(window, SAID, "notes.mp4: not a readable video")
    window.shot("refused")
    window.locator("#fsar-files").get_by_label("Clear").first.click()
    teach(window, "wave", [clips / "long.mp4"])
    says(window, SAID, "long.mp4: too long")
    window.locator("#fsar-files").get_by_label("Clear").first.click()
    for name, why in (("notes.txt", "Invalid file type"), ("enormous.mp4", "maximum allowed size")):
        window.locator("#fsar-files input[type=file]").set_input_files(clips / name)
        window.get_by_text(why).first.wait_for()
        window.shot(f"refused_{name}")


def test_phone(visit):
    window = visit(viewport={"width": 360, "height": 740}, device_scale_factor=2, is_mobile=True, has_touch=True)
    window.get_by_role("button", name="Recognise").tap()
    says(window, ".fsar-verdict", page.EXAMPLE[0])
    window.shot("phone")
    assert window.evaluate("document.documentElement.scrollWidth") <= 360


CONTRAST = """() => {
  const numbers = c => c.match(/[\\d.]+/g).map(Number), light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map(k => a * top[k] + (1 - a) * below[k]) };
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255] };
  const below = e => { const stack = []; for (; e; e = e.parentElement) stack.push(rgba(getComputedStyle(e).backgroundColor)); return stack.reverse().reduce((b, t) => over(t, b), [255, 255, 255]) };
  const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
  const shown = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && e.getBoundingClientRect().width > 1 && !e.closest("[disabled]");
  return [...document.body.querySelectorAll("*")].filter(e => own(e) && shown(e) && !["SCRIPT", "STYLE"].includes(e.tagName)).map(e => {
    const back = below(e), front = over(rgba(getComputedStyle(e).color), back), [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.tagName, e.textContent.trim().slice(0, 40), getComputedStyle(e).color, back.map(Math.round).join(" ")] }) }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, scheme, clips):
    "All text that is seen stands out from what is behind it, by WCAG's 4.5, errors and answers included."
    window = visit(color_scheme=scheme)
    window.get_by_role("button", name="Recognise").click()
    says(window, ".fsar-verdict", page.EXAMPLE[0])
    window.get_by_role("button", name="Learn", exact=True).click()
    says(window, SAID, "has no name")
    window.mouse.move(0, 0)
    window.wait_for_timeout(500)  # colours move for a moment
    window.shot(scheme)
    found = window.evaluate(CONTRAST)
    assert len(found) > 30 and not [row for row in found if row[0] < 4.5]


UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button, video")].filter(e => e.checkVisibility({visibilityProperty: true}) && e.type != "hidden").filter(e =>
  !(e.labels && [...e.labels].some(l => l.textContent.trim())) && !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby") && !e.title && !(e.tagName == "BUTTON" && e.textContent.trim())).map(e => e.outerHTML.slice(0, 200))"""


def test_labels_and_keyboard(visit):
    "Every control has a name, all are reached by Tab in the order of reading, and the page works without a mouse."
    window = visit()
    assert window.evaluate(UNNAMED) == []
    assert window.locator(f"{SAID}[aria-live=polite]").count() == 1 and window.locator(f"{ANSWER}[aria-live=polite]").count() == 1
    order = []
    for _ in range(60):
        window.keyboard.press("Tab")
        order.append(window.evaluate("(e => (e.labels?.[0]?.textContent || e.getAttribute('aria-label') || e.textContent || '').trim())(document.activeElement)"))
    wanted = ["Name of the class", "Learn", "Class to forget", "Forget class", "Forget all", "Load example", "Recognise"]
    places = [next((k for k, seen in enumerate(order) if seen == name), -1) for name in wanted]
    assert -1 not in places and places == sorted(places), order
    window.get_by_role("button", name="Recognise").focus()
    window.keyboard.press("Enter")
    says(window, ".fsar-verdict", page.EXAMPLE[0])


def test_a_recorded_video(visit):
    "From the camera (the browser's own test picture) to an answer."
    window = visit()
    box = window.locator("#fsar-query")
    box.get_by_label("Clear").first.click()
    box.get_by_label("Capture from camera").click()
    box.get_by_text("Click to Access Webcam").click()
    box.get_by_role("button", name="start recording").click()
    window.wait_for_timeout(3000)
    box.get_by_text("Stop").click()  # Gradio's button keeps its name
    box.locator("video[src*='.webm'], video[src*='.mp4']").wait_for()
    window.get_by_role("button", name="Recognise").click()
    window.locator(f"{ANSWER} p").first.wait_for()
    window.shot("recorded")
    assert window.locator(".fsar-verdict").count(), window.locator(ANSWER).inner_text()


# From the command line

@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_until_stopped_leaves_nothing(site, tmp_path, stop, clips):
    "The command says where its page is, takes an upload, and when it is stopped its temporary folder is empty."
    run = subprocess.Popen([sys.executable, "-c", "import sys; from fsar.cli.main import main; sys.exit(main())", "serve", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        url = json.loads(run.stdout.readline())["url"]
        assert post(url, "clip.mp4", (clips / "split_0.mp4").read_bytes())[0] == 200 and list(tmp_path.rglob("clip.mp4"))
        run.send_signal(stop)
        said = run.communicate(timeout=30)[1]
    finally: run.kill()
    assert run.returncode == 0 and "Traceback" not in said and not [p for p in tmp_path.rglob("*") if p.suffix == ".mp4" or p.name.startswith("fsar-")]


def test_serve_names_what_is_wrong(site, capsys):
    taken = str(urllib.parse.urlsplit(site[0]).port)
    for words, why in ((["--port", taken], f"port {taken}"), (["--model", "molo-motion-mini"], "Did you mean 'molo-motions-mini'?"), (["--max-mb", "0"], "mb"), (["--keep", "0"], "keep")):
        assert main(["serve", *words]) == 2
        assert why in capsys.readouterr().err


def test_uploads_end_after_their_time(recognizer, clips):
    "What was sent is gone after its time, and the page is still there."
    pytest.importorskip("gradio", reason="the page needs gradio (pip install 'fsar[web]')")
    with page.serving(recognizer, keep=2) as url:
        room = Path(os.environ["GRADIO_TEMP_DIR"])
        path = Path(json.loads(post(url, "clip.mp4", (clips / "split_0.mp4").read_bytes())[1])[0])
        assert path.is_file() and path.is_relative_to(room)
        deadline = time.monotonic() + 20
        while path.exists() and time.monotonic() < deadline: time.sleep(0.2)
        assert not path.exists() and status(url)[0] == 200

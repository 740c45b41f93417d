"""The page in a headless browser: asked, followed, seen, played, kept; by keyboard, on a phone, with a key."""
import os
import shutil
import threading
import time

import pytest
from services import package, program
from serving import PROMPT, opened, served

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def browser():
    with package("playwright.sync_api").sync_playwright() as play:
        made = play.chromium.launch(executable_path=program("chromium", "chromium"), args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"])
        yield made
        made.close()


@pytest.fixture(autouse=True)
def closed(browser):
    "No page stays open behind its test: each plays a film, for ever."
    yield
    for context in browser.contexts:
        context.close()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    import numpy as np
    from PIL import Image

    from vidgen.clip import Clip
    from vidgen.world import render, scene

    folder = tmp_path_factory.mktemp("film")
    clip = Clip(render(scene(7, shape="circle", colour="red", motion="right", background="white")).frames, 8.0)
    clip.save(folder / "clip.mp4")
    Image.fromarray(np.concatenate(list(clip.frames[::4]), axis=1)).save(folder / "strip.png")  # as a worker's preview: frames side by side
    return folder


@pytest.fixture
def service(tmp_path):
    made = opened(tmp_path)
    yield made
    made.jobs.close()


class Worker(threading.Thread):
    "Does every job slowly: progress, a preview, more progress, the film."

    def __init__(self, service, film, pause=0.3):
        super().__init__(daemon=True)
        self.service, self.film, self.pause, self.stop = service, film, pause, threading.Event()

    def run(self):
        from vidgen.serve.records import Lost

        while not self.stop.wait(0.05):
            if claim := self.service.jobs.claim("worker-test"):
                try:
                    self.work(claim)
                except Lost:
                    pass

    def work(self, claim):
        for percent in (10, 30, 60, 90):
            if claim.cancel_requested():
                return claim.canceled()
            claim.event("progress", {"stage": "make", "progress": percent, "message": "denoise", "step": percent // 4, "steps": 25})
            if percent == 30:
                claim.preview(shutil.copy(self.film / "strip.png", claim.staging / "preview-1.png"))
            time.sleep(self.pause)
        shutil.copy(self.film / "clip.mp4", claim.staging / "clip.mp4")
        claim.publish([claim.staging / "clip.mp4"], {"video": "clip.mp4", "frames": 17, "fps": 8.0, "duration": 2.125, "seed": claim.job.spec.get("seed", 0), "model": "shapes-t2v", "seconds": 1.2, "warnings": []})


@pytest.fixture
def worker(service, film):
    made = Worker(service, film)
    made.start()
    yield made
    made.stop.set()
    made.join()


def until(page, expression, seconds=30):
    "Wait for a truth on the page; asked from outside, for its own policy allows no eval."
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression}; {getattr(page, 'trouble', '')}"
        time.sleep(0.05)


def visit(browser, address, key="", **how):
    context = browser.new_context(**how)
    if key:
        context.add_init_script(f"sessionStorage.setItem('key', '{key}')")
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda m: m.type == "error" and page.trouble.append(m.text))
    page.on("pageerror", lambda e: page.trouble.append(str(e)))
    page.on("request", lambda r: r.url.startswith((address, "blob:", "data:")) or page.trouble.append(f"asked elsewhere: {r.url}"))
    page.goto(address)
    until(page, "document.querySelectorAll('#model option').length > 0")
    return page


def shot(page, name):
    if folder := os.environ.get("VIDGEN_TEST_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_a_clip_from_the_prompt_to_the_download(browser, service, worker, tmp_path):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("summary")
        page.fill("[name=seed]", "7")
        page.click("#go")
        until(page, "document.querySelector('#bar').value >= 30 && document.querySelector('#bar').value < 100")
        until(page, "!document.querySelector('#preview').hidden && document.querySelector('#preview').naturalWidth > 0")
        until(page, "getComputedStyle(document.querySelector('#preview')).getPropertyValue('--cells').trim() === '5'")
        box = page.locator("#preview").bounding_box()
        assert abs(box["width"] / box["height"] - 1.5) < 0.02  # one frame at a time
        shot(page, "running")
        until(page, "document.querySelector('#player').readyState >= 2 && !document.querySelector('#player').hidden")
        until(page, "document.querySelector('#player').currentTime > 0")
        shot(page, "finished")
        assert page.evaluate("document.querySelector('#player').videoWidth") == 96 and "finished" in page.inner_text("#message") and "seed 7" in page.inner_text("#facts")
        with page.expect_download() as got:
            page.click("#download")
        got.value.save_as(tmp_path / "got.mp4")
        assert (tmp_path / "got.mp4").read_bytes() == (worker.film / "clip.mp4").read_bytes() and got.value.suggested_filename == f"{PROMPT.replace(' ', '-')}-{service.jobs.list()[0].id[-6:]}.mp4"
        page.reload()
        until(page, "document.querySelectorAll('#history li').length == 1")
        assert PROMPT in page.inner_text("#history") and not page.trouble, page.trouble


def test_by_keyboard_alone(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        page.keyboard.press("n")
        page.keyboard.type(PROMPT)
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelector('#player').readyState >= 2")
        page.keyboard.press("Escape")
        page.keyboard.press("j")
        assert page.evaluate("document.activeElement.parentElement.id").startswith("job_")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#history [aria-current=true]') !== null")
        assert not page.trouble, page.trouble


def test_a_job_is_canceled_and_a_mistake_is_told(browser, service, film):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("#go")
        page.wait_for_selector("#history li.queued")
        page.click("#cancel")
        page.wait_for_selector("#history li.canceled")
        page.fill("#prompt", "   ")
        page.click("#go")
        page.wait_for_selector("#error:not([hidden])")
        assert "prompt" in page.inner_text("#error").lower()


def test_on_a_phone_nothing_sticks_out(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address, viewport={"width": 360, "height": 740}, device_scale_factor=2, is_mobile=True, has_touch=True)
        page.fill("#prompt", "a" * 300)
        page.tap("#go")
        until(page, "document.querySelector('#player').readyState >= 2")
        page.tap("summary")
        page.evaluate("window.scrollTo(0, 0)")
        shot(page, "phone")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        small = page.evaluate("[...document.querySelectorAll('button, input, select, .button')].filter(e => e.offsetParent && e.getBoundingClientRect().height < 40).map(e => e.id || e.outerHTML)")
        assert not small and not page.trouble, (small, page.trouble)


def test_the_narrowest_phone_has_room_for_everything(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address, viewport={"width": 320, "height": 600}, device_scale_factor=2, is_mobile=True, has_touch=True, color_scheme="dark")
        continued(page, service)
        page.tap("summary")
        page.evaluate("window.scrollTo(0, 0)")
        shot(page, "narrow")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320 and not page.trouble, page.trouble


@pytest.mark.parametrize("width", [1280, 560, 360])
def test_nothing_jumps_when_a_clip_begins_and_ends(browser, service, film, width):
    service.jobs.cancel(service.jobs.submit("generate", {"prompt": PROMPT}).id)
    with served(service) as address:
        page = visit(browser, address, viewport={"width": width, "height": 740})
        where = lambda: page.evaluate("['stage', 'now-prompt', 'message', 'history-title'].map(id => Math.round(document.getElementById(id).getBoundingClientRect().top + scrollY))")
        until(page, "document.querySelector('#message').textContent === 'canceled'")
        places = [where()]
        page.fill("#prompt", PROMPT)
        page.click("#go")
        until(page, "document.querySelector('#message').textContent === 'queued'")
        places.append(where())
        worker = Worker(service, film, 0.05)
        worker.start()
        page.wait_for_selector("#history li.succeeded")
        places.append(where())
        worker.stop.set()
        worker.join()
        assert places[0] == places[1] == places[2], places


def test_with_a_key(browser, service, worker):
    key, _ = service.keys.create("ada")
    with served(service) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('#model option').length > 0")
        page.fill("#prompt", PROMPT)
        page.click("#go")
        until(page, "document.querySelector('#preview').naturalWidth > 0")
        until(page, "document.querySelector('#player').readyState >= 2")
        until(page, "document.querySelector('#history .still').style.backgroundImage.includes('blob:')")
        assert key not in page.url and service.jobs.list()[0].owner == "ada"


def test_the_whole_way_by_keys(browser, service, film):
    "Cancel, another take, pause, download and back to the prompt, without a pointer."
    worker = Worker(service, film, 0.05)
    with served(service) as address:
        page = visit(browser, address)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.keyboard.press("n")
        page.keyboard.type(PROMPT)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#history li.queued")
        page.keyboard.press("Escape")
        page.keyboard.press("c")
        page.wait_for_selector("#history li.canceled")
        worker.start()
        page.keyboard.press("a")
        page.wait_for_selector("#history li.succeeded")
        assert service.jobs.list()[0].spec == service.jobs.list()[1].spec  # what was canceled is tried again as it was
        until(page, "!document.querySelector('#player').hidden && !document.querySelector('#player').paused")
        page.keyboard.press("a")
        until(page, "document.querySelectorAll('#history li.succeeded').length === 2")
        assert service.jobs.list()[0].spec["seed"] == 1
        until(page, "!document.querySelector('#player').hidden && !document.querySelector('#player').paused")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("Space")
        until(page, "document.querySelector('#player').paused")
        with page.expect_download():
            page.keyboard.press("d")
        assert page.evaluate("document.title") == "✓ vidgen" and not page.trouble, page.trouble
        worker.stop.set()
        worker.join()


def test_a_look_elsewhere_and_back_shows_the_preview_again(browser, service, film):
    with served(service) as address:
        page = visit(browser, address)
        for prompt in (PROMPT, "another"):
            page.fill("#prompt", prompt)
            page.click("#go")
            until(page, f"document.querySelector('#now-prompt').textContent === {prompt!r}")
        claim = service.jobs.claim("worker-test")
        claim.preview(shutil.copy(film / "strip.png", claim.staging / "preview-1.png"))
        first, second = (f"#{job.id} button" for job in reversed(service.jobs.list()))
        page.click(first)
        until(page, "!document.querySelector('#preview').hidden && document.querySelector('#preview').naturalWidth > 0")
        page.click(second)
        until(page, "document.querySelector('#preview').hidden")
        page.click(first)
        until(page, "!document.querySelector('#preview').hidden")
        assert not page.trouble, page.trouble


def test_history_shows_stills_takes_up_and_forgets(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("summary")
        page.fill("[name=num_inference_steps]", "9")
        page.click("#go")
        page.wait_for_selector("#history li.succeeded")
        until(page, "document.querySelector('#history .still').style.backgroundImage.includes('thumbnail')")
        page.reload()
        page.click("#history button")
        page.click("#reuse")
        assert page.input_value("#prompt") == PROMPT and page.input_value("[name=num_inference_steps]") == "9"
        page.click("#forget")
        assert "good" in page.inner_text("#forget") and len(service.jobs.list()) == 1
        page.click("#forget")
        until(page, "document.querySelectorAll('#history li').length === 0 && !document.querySelector('#empty').hidden")
        assert page.inner_text("#now-prompt") == "Your clip appears here" and not service.jobs.list() and not page.trouble, page.trouble


def test_a_clip_is_continued(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("#go")
        page.wait_for_selector("#history li.succeeded")
        page.fill("#prompt", "it stops")
        page.click("#goon")
        until(page, "document.querySelectorAll('#history li.succeeded').length === 2")
        more, first = service.jobs.list()
        assert more.spec["prompt"] == "it stops" and more.spec["extends"]["frames"] == 17 and more.spec["num_frames"] == 17 and more.model == "shapes-i2v" and "extends" not in first.spec
        until(page, "!document.querySelector('#again').hidden")
        assert not page.trouble, page.trouble


def continued(page, service):
    "Make a clip and continue it; (the continued job, the first)."
    page.fill("#prompt", PROMPT)
    page.click("#go")
    page.wait_for_selector("#history li.succeeded")
    page.click("#goon")
    until(page, "document.querySelectorAll('#history li.succeeded').length === 2")
    return service.jobs.list()


def test_a_continued_clip_is_told_from_its_first_part(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        more, first = continued(page, service)
        told, before = (page.inner_text(f"#{job.id} .state") for job in (more, first))
        assert told.startswith("continued") and "continued" not in before and "seed 0" in told and page.inner_text(f"#{first.id} .length") == "2.1\u00a0s"
        shadows = page.evaluate("[...document.querySelectorAll('#history .still')].map(e => getComputedStyle(e).boxShadow)")
        assert shadows[0] != "none" and shadows[1] == "none"
        shot(page, "continued")
        page.click("#first")
        until(page, f"document.querySelector('#{first.id} button').getAttribute('aria-current') === 'true'")
        assert not page.is_visible("#before") and not page.trouble, page.trouble


def test_another_take_of_a_continued_clip_continues_the_same_clip(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        more, first = continued(page, service)
        page.click("#again")
        until(page, "document.querySelectorAll('#history li.succeeded').length === 3")
        take = service.jobs.list()[0]
        assert take.spec == more.spec | {"seed": 1} and take.spec["extends"]["video"] == first.id
        page.click("#reuse")
        assert page.is_visible("#follows") and not page.is_visible("#options") and page.input_value("#prompt") == PROMPT
        page.fill("#prompt", "it stops")
        page.click("#go")
        until(page, "document.querySelectorAll('#history li.succeeded').length === 4")
        assert service.jobs.list()[0].spec == more.spec | {"prompt": "it stops"}
        service.jobs.delete(first.id)
        page.click("#again")
        page.wait_for_selector("#error:not([hidden])")
        assert "is gone" in page.inner_text("#error") and len(service.jobs.list()) == 3
        page.click("#fresh")
        page.click("#go")
        until(page, "document.querySelectorAll('#history li').length === 5")
        assert "extends" not in service.jobs.list()[0].spec


def test_a_clip_of_another_rate_is_continued_by_as_many_frames(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("#go")
        page.wait_for_selector("#history li.succeeded")
        page.evaluate("jobs.get(shown).result.fps = 4")  # as if it had been asked for so
        page.click("#goon")
        until(page, "document.querySelectorAll('#history li').length === 2")
        assert service.jobs.list()[0].spec["num_frames"] == 1 + 4 * 8


def test_progress_is_told_in_plain_words(browser, service):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("#go")
        says = lambda words: until(page, f"document.querySelector('#message').textContent.startsWith({words!r}) && document.querySelector('#history .state').textContent.startsWith({words!r})")
        says("queued")
        claim = service.jobs.claim("worker-test")
        tell = lambda message, step, steps, progress: claim.event("progress", {"stage": "make", "progress": progress, "message": message, "step": step, "steps": steps})
        claim.event("progress", {"stage": "make", "progress": 0, "message": ""})
        says("starting")
        tell("text", 0, 1, 0)
        says("reading the prompt")
        tell("denoise", 2, 20, 10)
        says("making, step 2 of 20")
        assert "left" not in page.inner_text("#message")  # one step says nothing of how long one takes
        time.sleep(1)
        tell("denoise", 3, 20, 14)
        says("making, step 3 of 20 · about ")
        assert page.inner_text("#message").endswith(" s left") and "make" not in page.inner_text("#message")
        tell("denoise", 20, 20, 85)
        until(page, "document.querySelector('#said').textContent.startsWith('85 %')")
        tell("decode", 0, 1, 85)
        says("turning it into frames")
        tell("decode", 1, 1, 100)
        says("writing the file")
        service.jobs.cancel(claim.job.id)
        page.click("#cancel")
        says("stopping")
        spans = [page.evaluate(f"left({{ state: 'running', due: Date.now() + {1000 * s} }})") for s in (0.5, 6, 41, 600)]
        assert spans == ["", "a few seconds left", "about 45 s left", "about 10 min left"] and not page.trouble, page.trouble


def finished(service, film, prompt=PROMPT):
    "A finished job that no page has asked for."
    job = service.jobs.submit("generate", {"prompt": prompt}, model="shapes-t2v")
    claim = service.jobs.claim("worker-test")
    shutil.copy(film / "clip.mp4", claim.staging / "clip.mp4")
    claim.publish([claim.staging / "clip.mp4"], {"video": "clip.mp4", "frames": 17, "fps": 8.0, "duration": 2.125, "seed": 0, "model": "shapes-t2v", "seconds": 1.2, "warnings": []})
    return job


def test_the_newest_clip_is_there_from_the_beginning(browser, service, film):
    for prompt in ("the first", "the newest"):
        finished(service, film, prompt)
    failed = service.jobs.submit("generate", {"prompt": "never"})
    service.jobs.cancel(failed.id)
    with served(service) as address:
        page = visit(browser, address)
        until(page, "document.querySelector('#player').readyState >= 2 && !document.querySelector('#player').paused")
        assert page.inner_text("#now-prompt") == "the newest" and page.evaluate("document.activeElement === document.body")
        still = visit(browser, address, reduced_motion="reduce")
        until(still, "document.querySelector('#player').readyState >= 2")
        time.sleep(0.3)
        assert still.evaluate("document.querySelector('#player').paused") and not page.trouble + still.trouble


def test_what_was_asked_for_elsewhere_is_there_on_coming_back(browser, service, film):
    with served(service) as address:
        page = visit(browser, address)
        until(page, "!document.querySelector('#empty').hidden")
        job = finished(service, film)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_selector(f"#{job.id}.succeeded")
        service.jobs.submit("noop", {"seconds": 0})
        page.evaluate("renew()")
        assert page.locator("#history li").count() == 1  # a page of clips


def handed(service, owner="ada"):
    "Give everything to an owner; how that one visits."
    with service.jobs.writing() as ledger:
        for table in (ledger.t.job, ledger.t.artifact):
            ledger.run(table.update().values(owner=owner))
    return {"key": service.keys.create(owner)[0]}


def test_a_download_is_never_the_former_clip(browser, service, film):
    first, second = (finished(service, film, prompt) for prompt in ("the first", "the second"))
    given = handed(service)
    with served(service) as address:
        page = visit(browser, address, **given)
        until(page, "document.querySelector('#download').hasAttribute('href')")
        assert page.evaluate(f"show('{first.id}'); document.querySelector('#download').getAttribute('href')") is None  # its own is still on the way
        until(page, f"document.querySelector('#download').download.includes('the-first-{first.id[-6:]}')")


@pytest.mark.parametrize("prompt, name", [("夕日の海, slowly!", "夕日の海-slowly"), ("../../etc/passwd", "etc-passwd"), ("?!", "clip")])
def test_a_download_has_a_readable_name_with_a_key_too(browser, service, film, tmp_path, prompt, name):
    job = finished(service, film, prompt)
    with served(service) as address:
        page = visit(browser, address)
        until(page, "document.querySelector('#download').href")
        with page.expect_download() as got:
            page.click("#download")
        assert got.value.suggested_filename == f"{name}-{job.id[-6:]}.mp4"
    given = handed(service)
    with served(service) as address:
        page = visit(browser, address, **given)
        until(page, "document.querySelector('#download').href.startsWith('blob:')")
        with page.expect_download() as got:
            page.click("#download")
        assert got.value.suggested_filename == f"{name}-{job.id[-6:]}.mp4"


@pytest.mark.parametrize("keyed", [False, True])
def test_a_film_whose_time_is_over_says_so(browser, service, film, keyed):
    job = finished(service, film)
    service.jobs.artifacts(job.id)[0].path.unlink()
    given = handed(service) if keyed else {}
    with served(service) as address:
        page = visit(browser, address, **given)
        until(page, "document.querySelector('#message').textContent.includes('is gone')")
        assert not page.is_visible("#player") and not page.is_visible("#download") and page.is_visible("#again")


CONTRAST = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number), light = (c) => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c[3] === undefined || c[3] > 0.7) return c; } return [255, 255, 255]; };
    const ratio = (a, b) => { const [low, high] = [light(a), light(b)].sort((x, y) => x - y); return (high + 0.05) / (low + 0.05); };
    const faint = [];
    for (const e of document.querySelectorAll('body *')) {
        const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()), box = e.getBoundingClientRect();
        if (text && box.width > 1 && e.tagName !== 'OPTION' && ratio(numbers(getComputedStyle(e).color), behind(e)) < 4.5) faint.push(`text of ${e.id || e.outerHTML}`);
        if (e.placeholder && ratio(numbers(getComputedStyle(e, '::placeholder').color), behind(e)) < 4.5) faint.push(`placeholder of ${e.name}`);
        if (/INPUT|TEXTAREA|SELECT/.test(e.tagName) && e.type !== 'checkbox' && box.width && ratio(numbers(getComputedStyle(e).borderColor), behind(e.parentElement)) < 3) faint.push(`edge of ${e.name}`);
    }
    return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_both_schemes(browser, service, film, scheme):
    finished(service, film)
    for end in ("failed", "canceled"):
        job = service.jobs.submit("generate", {"prompt": end})
        if end == "failed":
            service.jobs.claim("worker-test").fail({"code": "broken", "message": "it broke"}, retry=False)
        else:
            service.jobs.cancel(job.id)
    with served(service) as address:
        page = visit(browser, address, color_scheme=scheme)
        page.click("summary")
        page.evaluate("tell(new Error('a mistake')); for (const name of ['follows', 'before', 'image-row', 'lent', 'forget']) document.getElementById(name).hidden = false")
        shot(page, scheme)
        assert page.evaluate(CONTRAST) == [] and page.evaluate("document.querySelectorAll('#history li').length") == 3


def test_a_job_that_nobody_can_do_says_so(browser, service):
    with served(service) as address:
        page = visit(browser, address)
        until(page, "document.querySelector('#health').textContent.startsWith('no worker is running')")
        assert page.evaluate("document.querySelector('#health').className") == "down"


def test_a_picture_is_where_a_clip_begins(browser, service, film, tmp_path):
    with served(service) as address:
        page = visit(browser, address)
        page.click("summary")
        page.select_option("#model", "shapes-i2v")
        page.fill("#prompt", PROMPT)
        page.click("#go")
        page.wait_for_selector("#error:not([hidden])")
        assert "first frame" in page.inner_text("#error") and not service.jobs.list()
        page.set_input_files("#image", film / "strip.png")
        page.click("#go")
        page.wait_for_selector("#history li.queued")
        assert service.jobs.list()[0].spec["image"].startswith("file_") and not page.trouble, page.trouble


def test_a_service_that_is_gone_is_told(browser, service):
    with served(service) as address:
        page = visit(browser, address)
    page.fill("#prompt", PROMPT)
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert "does not answer" in page.inner_text("#error")
    page.evaluate("health()")
    until(page, "document.querySelector('#health').className === 'down'")


def test_a_key_may_be_wrong_and_the_question_may_be_left(browser, service):
    service.keys.create("ada")
    with served(service) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#key-dialog", state="hidden")
        assert "key" in page.inner_text("#error")
        page.click("#key-button")
        page.fill("#key", "vg_wrong")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#error').textContent.includes('not valid')")


def test_everything_has_a_name_for_those_who_hear_it(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("#go")
        page.wait_for_selector("#history li.succeeded")
        nameless = """[...document.querySelectorAll('button, input, select, textarea, a, progress, dialog')].filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') ||
            e.textContent.trim() || (e.labels && e.labels.length))).map(e => e.outerHTML)"""
        assert page.evaluate(nameless) == [] and page.evaluate("document.querySelector('#said').textContent") == "finished"
        assert page.evaluate("[...document.querySelectorAll('[id]')].length === new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size")


def test_two_pages_see_the_same_job(browser, service, worker):
    with served(service) as address:
        first, second = visit(browser, address), visit(browser, address)
        first.fill("#prompt", PROMPT)
        first.click("#go")
        first.wait_for_selector("#history li.succeeded")
        second.reload()
        second.wait_for_selector("#history li.succeeded")


def test_the_docs_come_from_here(browser, service):
    with served(service) as address:
        page = browser.new_page()
        asked = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(f"{address}/docs")
        until(page, "document.body.innerText.includes('/v1/jobs')")
        shot(page, "docs")
        assert all(url.startswith((address, "data:")) for url in asked), asked


def test_the_focus_is_not_lost_when_its_button_goes(browser, service, film):
    with served(service) as address:
        page = visit(browser, address)
        at = lambda: page.evaluate("document.activeElement.id")
        page.fill("#prompt", PROMPT)
        page.focus("#go")
        page.keyboard.press("Enter")
        page.wait_for_selector("#history li.queued")
        assert at() == "go"
        page.focus("#cancel")
        page.keyboard.press("Enter")
        page.wait_for_selector("#history li.canceled")
        until(page, "document.activeElement.id === 'now-prompt'")
        page.focus("#again")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('#history li').length === 2")
        until(page, "document.activeElement.id === 'now-prompt'")
        page.keyboard.press("Enter")  # pressed once too often, it must not cancel what has just been asked for
        assert service.jobs.list()[0].state == "queued"


def test_a_row_is_the_same_one_while_it_is_pressed(browser, service):
    with served(service) as address:
        page = visit(browser, address)
        for prompt in (PROMPT, "another"):
            page.fill("#prompt", prompt)
            page.click("#go")
            until(page, f"document.querySelector('#now-prompt').textContent === {prompt!r}")
        claim = service.jobs.claim("worker-test")
        box = page.locator(f"#{claim.job.id} button").bounding_box()
        page.mouse.move(box["x"] + 9, box["y"] + 9)
        page.mouse.down()
        claim.event("progress", {"stage": "make", "progress": 30, "message": "denoise", "step": 5, "steps": 25})
        until(page, f"document.querySelector('#{claim.job.id} .state').textContent.includes('step 5')")
        page.mouse.up()
        until(page, f"document.querySelector('#now-prompt').textContent === {PROMPT!r}")


def test_a_wrong_option_is_seen_although_its_part_was_shut(browser, service):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.click("summary")
        page.fill("[name=num_inference_steps]", "500")
        page.click("summary")
        page.click("#go")
        until(page, "document.querySelector('#options').open && document.activeElement.name === 'num_inference_steps'")
        assert not service.jobs.list()


def test_one_press_too_many_is_one_job(browser, service):
    with served(service) as address:
        page = visit(browser, address)
        page.fill("#prompt", PROMPT)
        page.evaluate("for (let i = 0; i < 3; i++) document.querySelector('#ask').requestSubmit()")
        page.wait_for_selector("#history li.queued")
        assert len(service.jobs.list()) == 1 and page.get_attribute("#go", "aria-disabled") is None


def test_a_surprise_can_be_undone(browser, service):
    with served(service) as address:
        page = visit(browser, address)
        page.click("#prompt")
        page.keyboard.type("my own long prompt")
        page.click("#surprise")
        assert page.input_value("#prompt") != "my own long prompt"
        page.keyboard.press("Control+z")
        assert page.input_value("#prompt") == "my own long prompt"


def test_keys_can_be_turned_off_and_stay_so(browser, service):
    with served(service) as address:
        page = visit(browser, address)
        page.uncheck("#keys")
        page.reload()
        assert not page.is_checked("#keys")
        page.keyboard.press("n")
        assert page.evaluate("document.activeElement.id") != "prompt"
        page.check("#keys")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("n")
        assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_picture_is_asked_for_again_with_another_prompt(browser, service, worker):
    with served(service) as address:
        page = visit(browser, address)
        page.click("summary")
        page.select_option("#model", "shapes-i2v")
        page.fill("#prompt", PROMPT)
        page.set_input_files("#image", worker.film / "strip.png")
        page.click("#go")
        page.wait_for_selector("#history li.succeeded")
        page.reload()
        page.click("#reuse")
        page.fill("#prompt", "it grows")
        page.click("#go")
        until(page, "document.querySelectorAll('#history li').length === 2")
        new, old = service.jobs.list()
        assert new.spec["image"] == old.spec["image"] and new.spec["prompt"] == "it grows"


def test_a_job_deleted_elsewhere_does_not_hide_the_others(browser, service, film):
    with served(service) as address:
        page = visit(browser, address)
        for prompt in ("kept", "deleted"):
            page.fill("#prompt", prompt)
            page.click("#go")
            until(page, f"document.querySelector('#now-prompt').textContent === {prompt!r}")
        deleted, kept = service.jobs.list()
        page.evaluate("stream.close()")  # as when the connection is lost
        service.jobs.cancel(deleted.id)
        service.jobs.delete(deleted.id)
        page.evaluate("follow()")
        until(page, "document.querySelectorAll('#history li').length === 1")
        service.jobs.claim("worker-test").event("progress", {"stage": "make", "progress": 30, "message": "denoise", "step": 5, "steps": 25})
        until(page, f"document.querySelector('#{kept.id} .state').textContent.includes('step 5')")


def test_another_key_shows_nothing_of_the_first(browser, service, film):
    finished(service, film)
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().values(owner="ada"))
    ada, eve = (service.keys.create(name)[0] for name in ("ada", "eve"))
    with served(service) as address:
        page = browser.new_context().new_page()
        page.goto(address)
        for key, count in ((ada, 1), (eve, 0)):
            if key == eve:
                page.click("#key-button")
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
            until(page, f"document.querySelectorAll('#history li').length === {count} && document.querySelector('#empty').hidden === {str(count > 0).lower()}")
        assert page.inner_text("#now-prompt") == "Your clip appears here"


def test_without_swagger_the_docs_list_the_routes_and_miss_nothing(browser, service, monkeypatch):
    from vidgen.serve import page as pages

    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with served(service) as address:
        page, answers = browser.new_page(), []
        page.on("response", lambda r: answers.append((r.status, r.url)))
        page.goto(f"{address}/docs")
        until(page, "document.body.innerText.includes('POST /v1/jobs') && document.body.innerText.includes('pip install fastapi-swagger')")
        shot(page, "docs-plain")
        assert all(status < 400 and url.startswith(address) for status, url in answers), answers

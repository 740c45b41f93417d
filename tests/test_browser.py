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


def visit(browser, address, **how):
    context = browser.new_context(**how)
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
        assert (tmp_path / "got.mp4").read_bytes() == (worker.film / "clip.mp4").read_bytes() and got.value.suggested_filename.startswith("job_")
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
        until(page, "document.querySelector('#again').hidden")
        page.click(f"#{first.id} button")
        until(page, "!document.querySelector('#again').hidden")
        assert not page.trouble, page.trouble


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

"""An open loop of HTTP requests that costs the client little, so that what is measured is the service: prepared bytes, kept connections, one thread."""
import asyncio
import json
import random
import re
import time
from urllib.parse import urlsplit

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)


class Line:
    "A kept connection that carries one request at a time."

    @classmethod
    async def open(cls, host, port):
        made = cls()
        made.used = time.perf_counter()
        made.reader, made.writer = await asyncio.open_connection(host, port)
        return made

    @property
    def good(self):
        "A server closes a connection that was quiet for five seconds; one that may be about to is not used."
        return time.perf_counter() - self.used < 4 and not self.reader.at_eof()

    async def ask(self, request):
        "(status, body) of the answer to the bytes of a request."
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        body = await self.reader.readexactly(int(LENGTH.search(head)[1]))
        self.used = time.perf_counter()
        return int(head[9:12]), body


class Load:
    "So many requests a second of each kind, sent when they are due, whatever became of those before. A time runs from when a request was due: a service that stands still for a second is seen to."

    def __init__(self, address, submits, reads, lists):
        at = urlsplit(address)
        self.host, self.port, self.rates = at.hostname, at.port, {"submit": submits, "status": reads, "list": lists}
        self.times, self.late, self.errors, self.ids, self.idle = {k: [] for k in self.rates}, [], [], [], []
        body = json.dumps({"kind": "noop", "spec": {}}).encode()
        head = f"Host: {at.netloc}\r\nConnection: keep-alive\r\n".encode()
        self.post = b"POST /v1/jobs HTTP/1.1\r\n" + head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        self.look = lambda path: b"GET " + path.encode() + b" HTTP/1.1\r\n" + head + b"\r\n"
        self.page = self.look("/v1/jobs?limit=20")

    def request(self, kind):
        if kind == "submit":
            return self.post
        return self.page if kind == "list" or not self.ids else self.look(f"/v1/jobs/{random.choice(self.ids)}")

    async def line(self):
        while self.idle:
            if (line := self.idle.pop()).good:
                return line
            line.writer.close()
        return await Line.open(self.host, self.port)

    async def one(self, kind, due):
        request = self.request(kind)
        self.late.append(time.perf_counter() - due)  # by the client's own fault
        try:
            line = await self.line()
            status, body = await line.ask(request)
            self.idle.append(line)
        except (OSError, EOFError, asyncio.LimitOverrunError, TypeError) as err:
            self.errors.append(repr(err))
            return
        self.times[kind].append(time.perf_counter() - due)
        if status >= 300:
            self.errors.append(body[:300].decode())
        elif request is self.post:
            self.ids.append(json.loads(body)["id"])

    async def lane(self, kind, rate, begin, seconds, tasks):
        for i in range(round(seconds * rate)):
            due = begin + i / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self.one(kind, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def go(self, seconds):
        tasks, begin = set(), time.perf_counter() + 0.1
        await asyncio.gather(*(self.lane(kind, rate, begin + n * 0.001, seconds, tasks) for n, (kind, rate) in enumerate(self.rates.items()) if rate))
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        for line in self.idle:
            line.writer.close()
        self.idle.clear()

    def run(self, seconds):
        "Load the service for so long; returns self."
        asyncio.run(self.go(seconds))
        return self

    def facts(self):
        "Requests, errors, and milliseconds at the median, the 99th per cent and the worst, of each kind; `late` is what the client itself lost."
        def marks(values):
            values = sorted(values)
            pick = lambda share: round(1000 * values[min(len(values) - 1, int(share * len(values)))], 2)
            return {"count": len(values), "median_ms": pick(0.5), "p99_ms": pick(0.99), "worst_ms": pick(1.0)} if values else {"count": 0}
        return {kind: marks(values) for kind, values in self.times.items()} | {"late": marks(self.late), "errors": len(self.errors)}

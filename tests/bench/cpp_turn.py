"""One turn of stable-diffusion.cpp, in a process of its own as Atelier's are: what it shall do is the first argument, in JSON, and the
seconds of each forward go to standard output. It ends with the last of them: nobody waits for the rest of the picture."""

import sides  # first: it sets how memory is kept

import ctypes
import json
import os
import re
import sys
import time

import stable_diffusion_cpp as cpp


class Watch:
    """Times a network's forwards by what stable-diffusion.cpp says as it goes."""

    def __init__(self, family, wanted):
        self.family, self.wanted = family, wanted
        self.began, self.found = 0.0, []

    def progress(self, step, _steps, _average):
        """Called before the first denoising step and after each one."""
        if self.family == "flux":
            self.mark(step > 0)

    def log(self, _level, text, _data):
        """Called with each line of its log, which is kept for the case that it fails."""
        sys.stderr.buffer.write(text)
        sys.stderr.flush()
        if self.family == "vae" and (b" - decoding " in text or b" decoded, taking" in text):
            self.mark(b" decoded, taking" in text)
        if self.family == "t5" and (taken := re.search(rb"computing condition graph completed, taking (\d+) ms", text)):
            self.add(int(taken[1]) / 1000)

    def mark(self, done):
        """A forward begins here; one may be done."""
        now = time.perf_counter()
        if done:
            self.add(now - self.began)
        self.began = now

    def add(self, seconds):
        """One forward took so long."""
        self.found.append(seconds)
        if len(self.found) == self.wanted:
            print(json.dumps(self.found), flush=True)
            os._exit(0)


def main():
    """A batch decodes several latents, guidance by a second text encodes two; FLUX.1's guidance is an input of its transformer."""
    turn = json.loads(sys.argv[1])
    family, wanted, side = turn["family"], turn["forwards"], turn["side"]
    watch = Watch(family, min(wanted, 2) if family == "t5" else wanted)
    log = cpp.sd_log_callback(watch.log)
    cpp.sd_set_log_callback(log, ctypes.c_void_p(0))
    model = cpp.StableDiffusion(**turn["settings"], vae_decode_only=True, n_threads=turn["threads"])
    model.generate_image(
        prompt="a lighthouse",
        width=side,
        height=side,
        cfg_scale=2.0 if family == "t5" else 1.0,
        guidance=3.5,
        sample_steps=wanted if family == "flux" else 1,
        batch_count=wanted if family == "vae" else 1,
        progress_callback=watch.progress,
    )
    sys.exit(f"stable-diffusion.cpp told of {len(watch.found)} forwards: no picture, or its log reads differently in this version")


if __name__ == "__main__":
    main()

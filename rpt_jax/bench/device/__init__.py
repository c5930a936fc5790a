"""The bench `device`: what an accelerator reaches, part by part, in a limited time.

`command` starts a process for each part (`runner`), `part_process` is that process, and the other modules measure.
"""

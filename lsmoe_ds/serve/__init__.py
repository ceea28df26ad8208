"""Serve models over HTTP with LibreTranslate's API; a sub-network is extracted when it is first requested.

- ``settings``   the options of the command line: limits, sizes, times
- ``models``     the models given: the directions of each, and how it is opened
- ``cuts``       the sub-network of one direction in the cache folder
- ``worker``     the thread of one engine, which translates lines that arrive together as one batch
- ``pool``       the loaded workers, within a memory limit
- ``text``       a text as lines, whose white space and line ends are kept
- ``detection``  the language of a text
- ``limits``     requests per minute and address, API keys
- ``requests``   the content of a request, read from a body that may be hostile
- ``service``    answers requests, independently of any HTTP framework
- ``app``        the paths, in FastAPI
- ``metrics``    counters for Prometheus
- ``command``    ``lsmoe serve``
- ``page/``      the page at ``/``
"""

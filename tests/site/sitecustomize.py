"""Every Python that a test starts begins with this: it does not look for garbage, which is a third of its start.

Half a million objects of torch and Transformers live until the end; a process of these tests is hardly more than its start.
"""

import atexit
import gc

gc.disable()
atexit.register(gc.freeze)

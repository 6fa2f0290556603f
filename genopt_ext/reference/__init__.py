"""What the kernels do, in plain torch operations: the fallback without the extension, and the truth in tests.

Module by module as ``csrc``: :mod:`math`, :mod:`rules`, :mod:`codecs`, :mod:`rounding`, :mod:`step`, :mod:`norms` and
:mod:`quantize`, in the same order of operations and so with the same bits.
"""

from .math import compute_dtype as compute_dtype
from .math import is_all_unset as is_all_unset
from .math import is_unset as is_unset
from .norms import join as join
from .norms import measure as measure
from .rules import RULES as RULES
from .step import average as average
from .step import interpolate as interpolate
from .step import shares as shares
from .step import step as step
from .step import swapped as swapped
from .step import undone_where as undone_where

"""What `qexport layout` prints."""

import json

from ...runtime.transformers_js import Layout


def print_layout(result: Layout) -> None:
    """The files, and how a program loads them."""
    print(f"{result.folder}: {', '.join(result.files)}")
    print(f'  in JavaScript: pipeline(TASK, "{result.folder}", {{dtype: "{result.dtype}"}})')
    if result.session:
        print("  with the numbers that `qexport validate` compared, if its options have this too:")
        print(f"  session_options: {{extra: {json.dumps(result.session)}}}")

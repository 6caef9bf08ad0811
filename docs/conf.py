"The site: what tools/docs.py has put beside a copy of this file."
from configparser import ConfigParser
from pathlib import Path

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")

project = html_title = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = [  # tools/docs.py checks links
    "myst.header", "myst.xref_missing", "misc.highlighting_failure"
]
html_theme = "furo"
html_copy_source = False
html_show_sourcelink = False

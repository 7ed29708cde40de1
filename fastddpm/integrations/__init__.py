"""Models and files of other projects, read into this one. A file a project; none is imported with
it, so that no peer has to be installed.
"""

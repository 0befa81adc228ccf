"""Scans on disk, cut into the slices that the network sees.

`kits` finds a site's cases, `volume` reads one, `window` scales its grey values, `prepared`
makes cases ready once and keeps them in a `store`, `draws` says which slices an epoch shows,
`slices` hands them out, `phantom` writes synthetic scans in the same layout.
"""

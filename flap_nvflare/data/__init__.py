"""Scans on disk, cut into the slices that the network sees.

`layouts` finds a site's cases, each layout in a file of its own; `preparation` checks a download;
`volume` reads one case, `window` scales its grey values, `prepared` makes cases ready once and
keeps them in a `store`, `draws` says which slices an epoch shows, `slices` hands them out,
`phantoms` writes synthetic scans in the same layouts.
"""

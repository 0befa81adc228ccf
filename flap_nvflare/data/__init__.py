"""Scans on disk, cut into the slices that the network sees.

`kits` finds a site's cases, `volume` reads one, `window` fixes the site's intensities, `slices`
draws training slices and evaluation batches, `phantom` writes synthetic scans in the same layout.
"""

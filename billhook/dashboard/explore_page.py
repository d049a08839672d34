"""x"""

from billhook.dashboard.layout import page_html


def explore_page(listing, request):
    """x"""
    return page_html("explore", listing.store, "")

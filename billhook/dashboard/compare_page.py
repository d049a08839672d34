"""x"""

from billhook.dashboard.layout import page_html


def compare_page(listing, request):
    """x"""
    return page_html("compare", listing.store, "")

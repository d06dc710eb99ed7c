// What the page does by itself, without the server: files dropped or pasted anywhere, following a growing reply, names
// for screen readers, the language that was chosen, and going on with its conversation when it is loaded again.
() => {
    const put = (field, files) => {
        const moved = new DataTransfer();
        for (const file of files) moved.items.add(file);
        field.files = moved.files;
    };
    const hand = (selector, files) => {
        const field = document.querySelector(selector);
        if (!field || !files.length) return;
        put(field, files);
        field.dispatchEvent(new Event("change", {bubbles: true}));
    };
    const isSaved = ({name}) => name.endsWith(".safetensors"), isPicture = ({type}) => type.startsWith("image/");
    const give = (files) => {
        hand("#keep input[type=file]", files.filter(isSaved).slice(0, 1));
        hand("#box input[type=file]", files.filter((file) => !isSaved(file)));
    };

    // However files came to the box, those that it does not take are refused in words of this page, before Gradio does.
    document.addEventListener("change", ({target}) => {
        if (!target.matches("#box input[type=file]")) return;
        const files = [...target.files], pictures = files.filter(isPicture);
        if (pictures.length === files.length) return;
        put(target, pictures);
        document.querySelector("#refuse").click();
    }, true);

    // Files dropped anywhere must not replace the page. On the box, too, they are not left to Gradio, which then is told
    // that they have gone.
    document.addEventListener("dragover", (event) => {
        if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
        const files = [...(event.dataTransfer?.files ?? [])];
        if (!files.length) return;
        event.preventDefault();
        event.stopPropagation();
        event.target.dispatchEvent(new DragEvent("dragleave", {bubbles: true}));
        give(files);
    }, true);
    document.addEventListener("paste", (event) => {
        const files = [...(event.clipboardData?.files ?? [])];
        if (event.defaultPrevented || !files.length || event.target.closest?.("#box")) return;
        give(files);
        event.preventDefault();
    });
    // Cells or words copied in an office program come with a picture of them, which Gradio would take instead; the text
    // that comes with a copied file is its name.
    document.addEventListener("paste", (event) => {
        const [file] = event.clipboardData?.files ?? [], words = event.clipboardData?.getData("text/plain");
        const writes = event.target.matches?.("input, textarea");
        if (writes && file && words && !words.includes(file.name)) event.stopPropagation();
    }, true);

    // The box is emptied when the reply to its message begins. What was typed behind the message until then is kept.
    let typed = "";
    document.addEventListener("input", ({target}) => {
        if (target.matches?.("#box textarea")) typed = target.value.trimStart();
    }, true);
    const keepTyped = () => requestAnimationFrame(() => {  // when all of the page is as it should be
        const box = document.querySelector("#box textarea");
        const asked = [...document.querySelectorAll("#chat [data-testid=user]")].at(-1)?.textContent.trim();
        const left = asked && typed.startsWith(asked) ? typed.slice(asked.length).trimStart() : "";
        typed = "";
        if (!left || box.value) return;
        box.value = left;
        box.dispatchEvent(new Event("input", {bubbles: true}));
    });

    // The end of the conversation stays in view until its reader scrolls up, and again from the next question on.
    let follows = true, questions = 0;
    const end = () => {
        const area = document.querySelector("#chat .bubble-wrap");
        const asked = document.querySelectorAll("#chat .user-row").length;
        if (asked > questions) {
            follows = true;
            keepTyped();
        }
        questions = asked;
        if (area && follows) area.scrollTop = area.scrollHeight;
    };
    document.addEventListener("scroll", ({target}) => {
        if (!target.matches?.("#chat .bubble-wrap")) return;
        follows = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
    }, true);
    document.addEventListener("load", ({target}) => target.closest?.("#chat") && end(), true);
    new MutationObserver(end).observe(document.querySelector("#chat"),
        {childList: true, subtree: true, characterData: true});

    // What Gradio leaves unsaid to a screen reader, or says worse than the words at hand.
    const name = () => {
        for (const example of document.querySelectorAll("#examples button")) {
            example.setAttribute("aria-label", example.querySelector(".caption-label").textContent);
        }
        for (const group of document.querySelectorAll("fieldset")) {
            group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]").textContent.trim());
        }
        for (const head of document.querySelectorAll("#side .label-wrap")) {
            head.setAttribute("aria-expanded", head.classList.contains("open"));
        }
        const word = document.querySelector("#brand [data-picture]").dataset.picture;
        for (const place of ["#chat .image-frame img", "#box .thumbnail-item img"]) {
            document.querySelectorAll(place).forEach((picture, index) => { picture.alt = `${word} ${index + 1}`; });
        }
    };
    name();
    new MutationObserver(name).observe(document.querySelector("#main"),
        {childList: true, subtree: true, characterData: true, attributeFilter: ["class", "src"]});
    // The examples vanish when one is chosen. A finger, which has no focus to lose, wants no keyboard to come up.
    document.addEventListener("click", ({target, detail}) => {
        if (detail === 0 && target.closest("#examples button")) document.querySelector("#box textarea").focus();
    });

    const KEY = "visualrwkv-language";
    const stored = (use) => { try { return use(localStorage); } catch { return null; } };  // a browser may forbid it
    // A page that is loaded again, by hand or by Gradio after its connection was cut, tells what it was called before. A
    // copy of a tab that is still open has nothing to tell.
    const PAGE = "visualrwkv-page";
    const ofTab = (use) => { try { return use(sessionStorage); } catch { return null; } };
    window.visualrwkv = {
        former: () => ofTab((place) => place.getItem(PAGE)) ?? "",
        remember: (name) => {
            ofTab((place) => place.removeItem(PAGE));
            window.addEventListener("pagehide", () => ofTab((place) => place.setItem(PAGE, name)));
        },
        language: () => ["en", "zh"].find((known) => known === stored((place) => place.getItem(KEY))) ?? null,
        choose: (language) => { stored((place) => place.setItem(KEY, language)); },
    };
}

"""Small label files in the formats that data sets publish, with their quirks."""

import json


def write(folder, files):
    """Files by name: text, bytes, or anything else as JSON."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    return folder


UCF101 = {  # Windows line ends; test lists have no numbers; the class of the video's name is spelled in another way
    "classInd.txt": "1 Archery\r\n2 HandstandPushups\r\n3 YoYo\r\n",
    "trainlist01.txt": "HandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\n"
    "Archery/v_Archery_g08_c01.avi 1\r\nYoYo/v_YoYo_g08_c01.avi 3\r\n",
    "testlist01.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n"
    "Archery/v_Archery_g01_c01.avi\r\nYoYo/v_YoYo_g01_c01.avi\r\n\r\n",
    "trainlist02.txt": "Archery/v_Archery_g01_c01.avi 1\nYoYo/v_YoYo_g01_c01.avi 3\n"
    "HandstandPushups/v_HandStandPushups_g01_c01.avi 2\n",
    "testlist02.txt": "Archery/v_Archery_g08_c01.avi\nYoYo/v_YoYo_g08_c01.avi\n",
}
HMDB51 = {  # a blank at the end of each line; names with # and blanks; 0 for neither part
    "brush_hair_test_split1.txt": "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \n"
    "#1 of 2_brush_hair_u_nm_np1.avi 2 \nx_brush.avi 0 \n",
    "wave_test_split1.txt": "a_wave_u.avi 2 \nb_wave_u.avi 1 \n",
    "brush_hair_test_split2.txt": "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 2 \n",
}
KINETICS = {  # names that begin with -, seconds as fractions, a test list without labels
    "train.csv": "label,youtube_id,time_start,time_end,split\nabseiling,-3B32lodo2M,59,69,train\n"
    '"massaging person\'s head",0347ZoDXyP0,5.0,15,train\n',
    "validate.csv": "label,youtube_id,time_start,time_end,split\nabseiling,0wR5jVB-WPk,417,427,validate\n",
    "test.csv": "youtube_id,time_start,time_end,split\n--6bJUbfpnQ,17,27,test\n",
}
SSV2 = {
    "something-something-v2-labels.json": {"Putting something onto something": "1", "Holding something": "0"},
    "something-something-v2-train.json": [
        {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
        {"id": "3", "label": "putting", "template": "Putting [something] onto [something]", "placeholders": ["a", "b"]},
    ],
    "something-something-v2-validation.json": [{"id": "5", "template": "Putting something onto something"}],
    "something-something-v2-test.json": [{"id": "9"}],
}
DIVING48 = {
    "Diving48_vocab.json": [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"]],
    "Diving48_V2_train.json": [
        {"vid_name": "-mYUzm2cJyk_00000", "label": 1, "start_frame": 0, "end_frame": 133},
        {"vid_name": "-mYUzm2cJyk_00001", "label": 0, "start_frame": 0, "end_frame": 99},
    ],
    "Diving48_V2_test.json": [{"vid_name": "f1Y9P4dLRqM_00001", "label": 0, "start_frame": 0, "end_frame": 133}],
    "Diving48_train.json": [{"vid_name": "-mYUzm2cJyk_00000", "label": 0, "start_frame": 0, "end_frame": 133}],
}
HOWTO100M = {
    "HowTo100M_v1.csv": "video_id,category_1,category_2,rank,task_id\nnVbIUDjzWY4,Cars & Other Vehicles,Motorcycles,27,52907\n"
    '-abcdefghij,"Food, drink",,2,1\nnVbIUDjzWY4,Hobbies,Games,3,7\n',
    "task_ids.csv": "52907\tPaint a Motorcycle\n",
}
